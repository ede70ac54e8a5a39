"""A procedural how-to universe in the benchmarks' own files, to run everything without a download.

A step is a verb, an object and a tool; a second of video is a fixed random non-linear mix of the
three, plus the video's own background and noise; narration says the step in one of many ways, with
fillers, chatter, time jitter and the repeats of automatic captions. 300 of the 3,072 combinations
are never shown nor said in training: the tests are about those.

    python data.py toy DIR              writes it (about five seconds, 20 MB, the same every time)
"""

import csv
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VERBS = [v.split() for v in (
    "chop dice", "slice", "mix", "stir swirl", "pour", "peel", "fry saute", "boil simmer", "bake",
    "grate", "mash crush", "whisk", "fold", "season", "drain", "wash rinse",
)]  # fmt: skip
OBJECTS = [o.split() for o in (
    "onion shallot", "carrot", "potato", "tomato", "pepper", "garlic", "beef", "chicken", "fish",
    "shrimp prawn", "rice", "pasta noodles", "bread", "cheese", "butter", "egg", "flour", "sugar",
    "milk", "apple", "lemon", "mushroom", "spinach", "eggplant aubergine",
)]  # fmt: skip
TOOLS = [t.split() for t in (
    "knife", "spoon", "bowl basin", "pan skillet", "pot", "board", "oven", "sieve",
)]  # fmt: skip
LEADS = ["now", "next", "then", "okay so", "um", "", "", "", ""]
STARTS = ["{}", "{}", "we {}", "you {}", "i am going to {}", "just {}", "go ahead and {}"]
# A narrator says what matters more than once, so that most hidden words can be read from the words
# around them: the shortcut that hiding a whole modality takes away (sec. 3.3). A caption has some
# 15 words: where none is short, short questions are unlike all that was read in pre-training.
TAILS = ["{0} that {1} with that {2}", "yes a {2} can {0} any {1}", "{0} {0} the {1} and the {2}",
         "the {2} will {0} the {1}", "and so we {0} {1} by {2}"]  # fmt: skip
CHATTER = [
    "thanks for watching my channel", "do not forget to subscribe", "i really love this part",
    "my grandmother taught me this", "the weather has been lovely today", "sorry about the noise",
    "let me know in the comments below", "we have a lot of things to do", "that looks really good",
]  # fmt: skip
PIECES_PER_SECOND = 2.4  # sec. 5.1.1
HELD_OUT = 300
WIDTH = 64  # E
VOCABULARY = 400  # at most: the words and the pieces that lead to them are fewer, none is split

Step = tuple[int, int, int]  # verb, object, tool


@dataclass
class Shot:
    """A step on screen, in seconds of its video."""

    step: Step
    start: int
    end: int


class World:
    """The concepts, how they look, and which combinations are held out."""

    def __init__(self, seed: int, scale: float):
        self.scale = scale
        self.rng = np.random.default_rng(seed)
        normal = self.rng.standard_normal
        self.looks = [normal((len(c), 32)) for c in (VERBS, OBJECTS, TOOLS)]
        self.mix1, self.mix2 = normal((32, 96)) / 32**0.5, normal((96, WIDTH)) / 96**0.5
        self.idle = normal(WIDTH) * 0.5  # what a camera sees when nothing happens
        every = [(v, o, t) for v in range(16) for o in range(24) for t in range(8)]
        order = self.rng.permutation(len(every))
        self.test = [every[i] for i in order[:HELD_OUT]]
        self.train = [every[i] for i in order[HELD_OUT:]]

    def count(self, n: int) -> int:
        """Say how many of something a world of this scale has."""
        return max(2, round(n * self.scale))

    def pick(self, words: list):
        """Draw one of a list."""
        return words[self.rng.integers(len(words))]

    def dish(self) -> list[Step]:
        """Draw a task of six training steps about two objects, done with two tools."""
        things, tools = ([int(self.rng.integers(n)) for _ in range(2)] for n in (24, 8))
        good = [s for s in self.train if s[1] in things and s[2] in tools]
        return [self.pick(good) for _ in range(6)]

    def view(self, step: Step) -> np.ndarray:
        """A step's clean feature (WIDTH,): a fixed non-linear mix of its three concepts."""
        mixed = sum(looks[i] for looks, i in zip(self.looks, step, strict=True))
        return np.tanh(0.6 * mixed @ self.mix1) @ self.mix2 * 2

    def film(self, shots: list[Shot], seconds: int) -> np.ndarray:
        """Features (seconds, WIDTH) float16 of a video: what is done, its background, noise."""
        clean = np.tile(self.idle, (seconds, 1))
        for shot in shots:
            clean[shot.start : shot.end] = self.view(shot.step)
        background = 0.6 * self.rng.standard_normal(WIDTH)
        return (clean + background + 0.5 * self.rng.standard_normal(clean.shape)).astype(np.float16)

    def words(self, step: Step) -> list[str]:
        """Choose among a step's synonyms: verb, object, tool."""
        return [self.pick(c[i]) for c, i in zip((VERBS, OBJECTS, TOOLS), step, strict=True)]

    def say(self, words: list[str]) -> str:
        """Say a step plainly: `dice the onion with the knife`."""
        return "{0} the {1} {3} the {2}".format(*words, self.pick(["with", "using", "in"]))

    def narrate(self, words: list[str]) -> str:
        """Say a step as a narrator does, with a lead and a tail."""
        said, tail = self.say(words), self.pick(TAILS).format(*words)
        parts = self.pick(LEADS), self.pick(STARTS).format(said), tail
        return " ".join(part for part in parts if part)

    def video(self, steps: Iterable[Step], low: int = 8, high: int = 20) -> tuple[list[Shot], int]:
        """Lay steps out in time with idle seconds between: (shots, seconds)."""
        shots, now = [], 0
        for step in steps:
            now += int(self.rng.integers(1, 4))
            length = int(self.rng.integers(low, high))
            shots.append(Shot(step, now, now + length))
            now += length
        return shots, now + 1

    def captions(self, shots: list[Shot], seconds: int) -> dict:
        """Narrate a video as automatic captions (HowTo100M form): late, early, repeated, chatty."""
        out = {"start": [], "end": [], "text": []}
        now, last = 0.0, []
        for shot in shots:
            now = max(now, shot.start + float(self.rng.normal(0, 0.7)))
            chosen = self.words(shot.step)  # a narrator keeps to her words while a step lasts
            while now < shot.end - 1:
                chatty = self.rng.random() < 0.12
                words = (self.pick(CHATTER) if chatty else self.narrate(chosen)).split()
                end = now + len(words) / PIECES_PER_SECOND
                start = now
                if last and self.rng.random() < 0.4:  # the end of the caption before, said again
                    again = last[-int(self.rng.integers(2, 5)) :]
                    start = max(0.0, now - len(again) / PIECES_PER_SECOND)
                    words = again + words
                out["start"].append(round(start, 2))
                out["end"].append(round(min(end, seconds), 2))
                out["text"].append(" ".join(words))
                now, last = end, words
        return out


def write_toy(folder: str | Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write the toy world into a new or empty folder, laid out as data.py says.

    Args:   seed: another one, another world. scale: share of the videos and clips to write.
    Raises: ValueError when the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; the toy world wants a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # moved into place when it is whole; two runs that start at once each write their own
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as aside:
        root = Path(aside) / "toy"
        (root / "features").mkdir(parents=True)
        world = World(seed, scale)
        narration = write_howto(root, world)
        write_msrvtt(root, world)
        write_youcook2_and_coin(root, world)
        write_crosstask(root, world)
        write_vocabulary(root, narration)
        dump(root / "toy.json", {"toy": 1, "seed": seed, "scale": scale, "width": WIDTH})
        try:
            root.replace(folder)
        except OSError:
            if not (folder / "toy.json").exists():  # another was faster, and its world is there
                raise


def dump(path: Path, data: object) -> None:
    """Write JSON, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def table(path: Path, rows: Iterable[Iterable], delimiter: str = ",") -> None:
    """Write a separated-values file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=delimiter, lineterminator="\n").writerows(rows)


def write_howto(root: Path, world: World) -> list[str]:
    """Write narrated videos of 200 six-step tasks for pre-training; return all that is said."""
    tasks = [world.dish() for _ in range(200)]
    captions = {}
    for name, count in (("train", 600), ("val", 40)):
        ids = [f"how_{name}_{i:04d}" for i in range(world.count(count))]
        for video in ids:
            kept = [s for s in world.pick(tasks) if world.rng.random() < 0.9]
            shots, seconds = world.video(kept or [world.pick(world.train)])
            np.save(root / "features" / f"{video}.npy", world.film(shots, seconds))
            captions[video] = world.captions(shots, seconds)
        (root / f"{name}.lst").write_text("".join(f"{video}\n" for video in ids))
    dump(root / "raw_caption.json", captions)
    return [text for video in captions.values() for text in video["text"]]


def write_msrvtt(root: Path, world: World) -> None:
    """Write clips of one step each: 600 to train on, 300 held-out ones for retrieval and QA."""
    data, test, questions = {"videos": [], "sentences": []}, [], []
    steps = [(f"video{i}", world.pick(world.train)) for i in range(world.count(600))]
    held_out = [
        (f"video{7000 + i}", step) for i, step in enumerate(world.test[: world.count(HELD_OUT)])
    ]
    for split, clips, count in (("train", steps, 3), ("test", held_out, 1)):
        for clip, step in clips:
            seconds = int(world.rng.integers(5, 13))
            np.save(
                root / "features" / f"{clip}.npy", world.film([Shot(step, 0, seconds)], seconds)
            )
            data["videos"].append({"video_id": clip, "split": split})
            said = [world.say(world.words(step)) for _ in range(count)]
            data["sentences"] += [{"video_id": clip, "caption": s} for s in said]
            if split == "test":
                test.append((clip, said[0]))
    for i, (clip, sentence) in enumerate(test):
        others = [j for j in world.rng.permutation(len(test)) if j != i and test[j][1] != sentence]
        answers = [test[j][1] for j in others[:4]]
        right = int(world.rng.integers(5))
        answers.insert(right, sentence)
        questions.append([clip.replace("video", "msr"), *answers, right])
    folder = root / "msrvtt"
    dump(folder / "MSRVTT_data.json", data)
    table(folder / "MSRVTT_train.csv", [["video_id"], *([clip] for clip, _ in steps)])
    rows = [(f"ret{i}", c.replace("video", "msr"), c, s) for i, (c, s) in enumerate(test)]
    table(folder / "MSRVTT_JSFUSION_test.csv", [["key", "vid_key", "video_id", "sentence"], *rows])
    header = ["vid_key", *(f"a{i}" for i in range(1, 6)), "answer"]
    table(folder / "MSRVTT_QA_test.csv", [header, *questions], delimiter="\t")


def write_youcook2_and_coin(root: Path, world: World) -> None:
    """Write videos with a sentence (YouCook2) and a label, the verb (COIN), for each segment."""
    cook, coin = {}, {}
    for split, count, steps in (("training", 160, world.train), ("validation", 50, world.test)):
        ids = [f"cook_{split}_{i:03d}" for i in range(world.count(count))]
        order = world.rng.permutation(len(steps))  # held-out steps come once each
        for n, video in enumerate(ids):
            shots, seconds = world.video([steps[order[6 * n + i]] for i in range(6)])
            np.save(root / "features" / f"{video}.npy", world.film(shots, seconds))
            about = {"duration": seconds, "subset": split, "recipe_type": "101"}
            said = [
                {"id": i, "segment": [s.start, s.end], "sentence": world.say(world.words(s.step))}
                for i, s in enumerate(shots)
            ]
            done = [
                {
                    "id": str(s.step[0] + 1),
                    "segment": [s.start, s.end],
                    "label": VERBS[s.step[0]][0],
                }
                for s in shots
            ]
            cook[video] = about | {"annotations": said}
            subset = "training" if split == "training" else "testing"
            coin[video] = about | {"subset": subset, "class": "Cook", "annotation": done}
        name = "train_list.txt" if split == "training" else "val_list.txt"
        table(root / "youcook2" / name, [[f"101/{video}"] for video in ids])
    dump(root / "youcook2" / "youcookii_annotations_trainval.json", {"database": cook})
    dump(root / "coin" / "COIN.json", {"database": coin})


def write_crosstask(root: Path, world: World) -> None:
    """Write twelve tasks of six held-out steps, eight videos each, three of them for validation;
    a video shows two to five of its task's steps."""
    folder, videos, held_back, blocks = root / "crosstask", [], [], []
    order = world.rng.permutation(HELD_OUT)
    for k in range(world.count(12)):
        task, steps = 20001 + k, [world.test[i] for i in order[6 * k : 6 * k + 6]]
        said = [world.say(world.words(step)) for step in steps]
        blocks.append(
            f"{task}\nCook dish {k + 1}\nhttps://example.org/{task}\n6\n{','.join(said)}\n\n"
        )
        for i in range(8):
            video = f"cross_{task}_{i}"
            # some steps are left out and lengths vary, or steps spread evenly would be right
            kept = sorted(world.rng.permutation(len(steps))[: int(world.rng.integers(2, 6))])
            shots, seconds = world.video([steps[n] for n in kept], 3, 30)
            np.save(root / "features" / f"{video}.npy", world.film(shots, seconds))
            rows = [
                (n + 1, f"{s.start:.2f}", f"{s.end:.2f}") for n, s in zip(kept, shots, strict=True)
            ]
            table(folder / "annotations" / f"{task}_{video}.csv", rows)
            videos.append((task, video, f"https://example.org/{video}"))
            if i >= 5:
                held_back.append(videos[-1])
    table(folder / "videos.csv", videos)
    table(folder / "videos_val.csv", held_back)
    (folder / "tasks_primary.txt").write_text("".join(blocks))
    (folder / "tasks_related.txt").write_text("")


def write_vocabulary(root: Path, narration: list[str]) -> None:
    """Train the toy world's own WordPiece vocabulary on its narration."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers word-inner letters in the order of a hash table and breaks ties by number:
    # numbering them first makes the vocabulary the same every time.
    letters = [f"##{chr(i)}" for i in range(ord("a"), ord("z") + 1)]
    trained = word_piece(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=special + letters, show_progress=False
    )
    trained.train_from_iterator(narration, trainer)
    tokenizer = word_piece(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(root / "tokenizer.json"))


def word_piece(model: models.WordPiece) -> Tokenizer:
    """Build a tokenizer that cleans and splits as BERT's uncased one does."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
