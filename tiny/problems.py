"""Word problems with worked solutions, made to measure: a small GSM8K that a tiny model can learn.

    python tiny/problems.py --split heldout --seed 0 --count 3

prints one JSON object a line with `question` and `answer`; the answer is a worked solution that ends in `####
N`. With `--conversations 0.25` a quarter of the lines are `messages` instead, in which a second question goes
on from the first.

A problem is a *skeleton* (the operations and their numbers, the only thing that decides the answer) told with
names and objects. The split hangs on a hash of the skeleton alone, so no held-out problem is a training
problem with other names, whatever the seeds. Every equation of an answer is computed by the function that
writes it, so answers are right by construction. All quantities stay between 2 and 99: one token each.
"""

import hashlib
import json
import random
from dataclasses import dataclass, field

import click

LARGEST = 99  # of any quantity, so that each is one token; bounds the facts that have to be learnt
MOST_STEPS = 5
HELD_OUT = 0.1  # share of the skeletons
MARKER = "####"

SHE = "Mia Anna Lily Nora Emma Ruth Ella Zoe Ida Clara Maya Rosa".split()
HE = "Tom Ben Leo Max Sam Paul Otto Noah Finn Jack Omar Luca".split()
OBJECTS = "apples pears books cards coins shells stamps pencils marbles stickers buttons cookies".split()
CONTAINERS = "boxes bags jars baskets".split()


@dataclass
class Story:
    """A problem while it is being told: what was said, what was worked out, and the number in hand."""

    rng: random.Random
    name: str
    pronoun: str
    friend: str
    things: str
    total: int = 0
    skeleton: list = field(default_factory=list)
    question: list = field(default_factory=list)
    answer: list = field(default_factory=list)

    def compute(self, operator, operand):
        """Apply one operation to the number in hand; the equation as text, like `12 + 7 = 19`."""
        left = self.total
        exact = {"+": left + operand, "-": left - operand, "*": left * operand, "/": left / operand}[operator]
        self.total = int(exact)
        assert self.total == exact and 2 <= self.total <= LARGEST
        self.skeleton.append(f"{left}{operator}{operand}")
        return f"{left} {operator} {operand} = {self.total}"


def start_plain(s):
    s.total = s.rng.randint(2, 90)
    s.skeleton.append(str(s.total))
    s.question.append(f"{s.name} has {s.total} {s.things}.")
    s.answer.append(f"{s.name} starts with {s.total} {s.things}.")


def start_groups(s):
    s.total, each = s.rng.randint(2, 9), s.rng.randint(2, 12)
    s.total = min(s.total, LARGEST // each)
    box = s.rng.choice(CONTAINERS)
    s.question.append(f"{s.name} has {s.total} {box} with {each} {s.things} in each.")
    s.answer.append(f"In the {box} there are {s.compute('*', each)} {s.things}.")


def change(s, operator, n, ways):
    """Tell one of the ways in which the number in hand changes by n, and work it out."""
    said, done = s.rng.choice(ways)
    s.question.append(said)
    s.answer.append(f"{done}, {s.name} has {s.compute(operator, n)} {s.things}.")


def gain(s):
    n = s.rng.randint(2, min(50, LARGEST - s.total))
    ways = [
        (f"{s.pronoun} buys {n} more.", f"After buying {n} more"),
        (f"{s.pronoun} finds {n} more.", f"After finding {n} more"),
        (f"{s.friend} gives {s.name} {n} more.", f"After {s.friend} gives {n} more"),
    ]
    change(s, "+", n, ways)


def lose(s):
    n = s.rng.randint(2, min(50, s.total - 2))
    ways = [
        (f"{s.pronoun} loses {n} of them.", f"After losing {n}"),
        (f"{s.pronoun} sells {n} of them.", f"After selling {n}"),
        (f"{s.pronoun} gives {n} of them to {s.friend}.", f"After giving {n} to {s.friend}"),
    ]
    change(s, "-", n, ways)


def double(s):
    s.question.append(f"Then the {s.things} double in number.")
    s.answer.append(f"Doubled, there are {s.compute('*', 2)} {s.things}.")


def hand_out(s):
    friends = s.rng.randint(2, min(6, (s.total - 2) // 2))
    each = s.rng.randint(2, min(9, (s.total - 2) // friends))
    s.question.append(f"{s.pronoun} gives {each} each to {friends} friends.")
    gone, left = friends * each, s.total
    s.total = friends
    s.answer.append(f"The friends get {s.compute('*', each)} {s.things}.")
    s.total = left
    s.answer.append(f"After that, {s.name} has {s.compute('-', gone)} {s.things}.")


def ask_now(s):
    s.question.append(f"How many {s.things} does {s.name} have now?")


def ask_together(s):
    n = s.rng.randint(2, LARGEST - s.total)
    s.question.append(f"{s.friend} has {n} {s.things}. How many {s.things} do they have together?")
    s.answer.append(f"Together with {s.friend} they have {s.compute('+', n)} {s.things}.")


def ask_share(s):
    n = s.rng.choice([n for n in range(2, 10) if s.total % n == 0 and s.total // n >= 2])
    s.question.append(
        f"{s.pronoun} shares them equally among {n} friends. How many {s.things} does each friend get?"
    )
    s.answer.append(f"Each friend gets {s.compute('/', n)} {s.things}.")


def ask_price(s):
    n = s.rng.randint(2, LARGEST // s.total)
    s.question.append(f"{s.pronoun} sells them all for {n} dollars each. How many dollars does {s.name} get?")
    s.answer.append(f"For {n} dollars each, {s.name} gets {s.compute('*', n)} dollars.")


def endings(s):
    """The questions that the number in hand allows."""
    yield ask_now
    if s.total <= LARGEST - 2:
        yield ask_together
    if any(s.total % n == 0 and s.total // n >= 2 for n in range(2, 10)):
        yield ask_share
    if s.total <= LARGEST // 2:
        yield ask_price


def steps(s):
    return sum(not part.isdigit() for part in s.skeleton)


def go_on(s, changes):
    """Change the number in hand a few times, as far as its size and the number of steps allow."""
    for _ in range(changes):
        room = MOST_STEPS - 1 - steps(s)
        options = [gain] * 3 * (s.total <= LARGEST - 2) + [lose] * 3 * (s.total >= 4)
        options += [double] * (s.total <= LARGEST // 2) + [hand_out] * (s.total >= 6 and room >= 2)
        if room > 0:
            s.rng.choice(options)(s)


def ask(s, worked):
    """Ask for something; where nothing was `worked` out yet, for something that has to be."""
    end = s.rng.choice([e for e in endings(s) if e is not ask_now or worked])
    end(s)
    s.skeleton.append(f"({end.__name__})")


def finish(s):
    """The question and the answer as text; the story may then go on with a further question."""
    told = " ".join(s.question), " ".join(s.answer) + f"\n{MARKER} {s.total}"
    s.question, s.answer = [], []
    return told


def tell(rng, turns=1):
    """A problem of 1 to 5 steps, told in one or two turns: (skeletons, [(question, answer), ...]).

    The last skeleton is that of the problem which tells all of it at once, the first that of the first turn
    alone.
    """
    girl = rng.random() < 0.5
    name, friend = rng.choice(SHE if girl else HE), rng.choice(HE if girl else SHE)
    s = Story(rng, name, "She" if girl else "He", friend, rng.choice(OBJECTS))
    rng.choice([start_plain, start_groups])(s)
    go_on(s, rng.choice([0, 1, 1, 2, 2, 3]) if turns == 1 else rng.choice([1, 1, 2]))
    if turns == 1:
        ask(s, steps(s))
        return [" ".join(s.skeleton)], [finish(s)]
    ask_now(s)  # the number in hand is still what there is, so the story can go on
    alone, first = " ".join([*s.skeleton, f"({ask_now.__name__})"]), finish(s)
    go_on(s, 1)
    ask(s, True)
    return [alone, " ".join(s.skeleton)], [first, finish(s)]


def held_out(skeleton):
    """Is this skeleton kept from training? A fixed hash decides, so that no seed can change it."""
    digest = hashlib.sha256(skeleton.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def problems(split, seed, conversations=0.0):
    """Endless problems of a split, as dicts: a function of the arguments alone.

    `question` and `answer`, or for a share of them `messages`: two questions and answers.
    """
    rng = random.Random(f"{split} {seed}")
    while True:
        turns = 2 if conversations and rng.random() < conversations else 1
        skeletons, told = tell(rng, turns)
        if any(held_out(skeleton) != (split == "heldout") for skeleton in skeletons):
            continue
        if turns == 1:
            yield dict(zip(("question", "answer"), told[0]))
        else:
            yield {
                "messages": [dict(role=r, content=c) for t in told for r, c in zip(("user", "assistant"), t)]
            }


@click.command(help=__doc__)
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--count", type=click.IntRange(1), default=10, show_default=True, help="How many problems.")
@click.option(
    "--conversations", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of them."
)
def main(split, seed, count, conversations):
    for _, problem in zip(range(count), problems(split, seed, conversations)):
        click.echo(json.dumps(problem))


if __name__ == "__main__":
    main()
