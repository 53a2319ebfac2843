"""{{name}}: sums of two numbers, and a reward for the right one."""

import re
from dataclasses import dataclass

from cosmos_plugin import Example, Sample, Score, Settings, dataset, option, plugin, reward, user


@dataclass
class Options:
    """What a run may set in `[custom.{{name}}]`."""

    numbers: int = option(10, help="The numbers are 0 to one less than this.", minimum=2, maximum=1000)
    form_credit: float = option(0.1, help="Score of a wrong answer in the right form.", minimum=0, maximum=1)


plugin(name="{{name}}", version="0.1.0", summary="sums of two numbers", options=Options)

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataset("train", role="train")
class Sums:
    """Every pair of numbers. Rows of a file or of the hub come from `cosmos_plugin.table`."""

    def __init__(self, settings: Settings) -> None:
        self.numbers = settings.own(Options).numbers

    def __len__(self) -> int:
        return self.numbers**2

    def __getitem__(self, index: int) -> Example:
        a, b = divmod(index, self.numbers)
        return Example([user(f"What is {a} + {b}? Put the result between <answer> and </answer>.")], reference=a + b)


@reward("{{name}}", role="train")
def score(sample: Sample, settings: Settings) -> Score:
    """`sample.reference` is what the dataset gave as the example's reference."""
    options = settings.own(Options)
    answers = ANSWER.findall(sample.completion)
    if not answers:
        return Score(0.0, {"has_answer": 0})
    right = answers[-1].strip() == str(sample.reference)
    return Score(1.0 if right else options.form_credit, {"has_answer": 1})
