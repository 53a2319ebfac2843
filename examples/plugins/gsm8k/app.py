"""GSM8K: grade-school word problems, graded by the number after `####`."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from cosmos_plugin import (
    DatasetSettings,
    Example,
    Sample,
    SampleError,
    Score,
    Settings,
    dataset,
    option,
    plugin,
    reward,
    system,
    table,
    user,
)
from numbers_after_hashes import MARK, final_answer, number

HUB_ID = "openai/gsm8k"
# The worked solutions note their sums as <<48/2=24>> for a calculator.
ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass
class Options:
    """What a run may set in `[custom.gsm8k]`."""

    prompt: Literal["messages", "text"] = "messages"
    """Messages for the student's chat template, or `Question: …\\nAnswer:` for a model without one."""
    instruction: str = option(
        f"Reason step by step. End with a line `{MARK} ` and the result as a plain number.",
        help="Added to every question; empty for none.",
    )
    system: str = option("", help="System message; empty for none.")
    keep_annotations: bool = option(False, help="Leave the <<48/2=24>> of the solutions in, for supervised training.")
    format_credit: float = option(
        0.0, help="Training score of a wrong number that is at least after `####`.", minimum=0, maximum=1
    )


plugin(
    name="gsm8k",
    version="0.1.0",
    summary="GSM8K word problems, graded by the number after `####`",
    options=Options,
)


class Problems:
    """Rows with `question` and `answer`: from the hub, or any file or folder that the run names."""

    def __init__(self, settings: Settings, split: str) -> None:
        self.options = settings.own(Options)
        self.rows = table.open(source(settings.dataset, split), columns=["question", "answer"])
        self.count = settings.dataset.limit(len(self.rows)) if split == "test" else len(self.rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        question, answer = str(row["question"]).strip(), str(row["answer"])
        right = final_answer(answer)
        if right is None:
            raise SampleError(f"row {index}: its answer has no number after `{MARK}`")
        solution = answer if self.options.keep_annotations else ANNOTATION.sub("", answer)
        if self.options.instruction:
            question = f"{question}\n{self.options.instruction}"
        if self.options.prompt == "text":
            return Example(f"Question: {question}\nAnswer:", reference=right, response=f" {solution}")
        before = [system(self.options.system)] if self.options.system else []
        return Example([*before, user(question)], reference=right, response=solution)


def source(section: DatasetSettings, split: str) -> DatasetSettings:
    """What the run names, or the hub's dataset. Only the hub's has a subset and splits that are known here."""
    if section.name in ("", HUB_ID):
        return replace(section, name=HUB_ID, subset=section.subset or "main", splits=section.splits or [split])
    return section


@dataset("train", role="train")
def train(settings: Settings) -> Problems:
    return Problems(settings, "train")


@dataset("validation", role="validation")
def validation(settings: Settings) -> Problems:
    return Problems(settings, "test")


def judge(sample: Sample) -> tuple[bool, bool]:
    """Whether there is a number after `####`, and whether it is the right one."""
    right = number(str(sample.reference)) if sample.reference is not None else None
    if right is None:
        raise SampleError(f"the reference is {sample.reference_json or 'missing'}, not a number")
    given = final_answer(sample.completion)
    return given is not None, given == right


@reward("gsm8k", role="train")
def score_train(sample: Sample, settings: Settings) -> Score:
    """1 for the right number, the format credit for another one, 0 for none."""
    has_answer, is_right = judge(sample)
    value = 1.0 if is_right else settings.own(Options).format_credit if has_answer else 0.0
    return Score(value, {"has_answer": has_answer, "right": is_right})


@reward("validation", role="validation")
def score_validation(sample: Sample) -> Score:
    """1 for the right number, else 0."""
    has_answer, is_right = judge(sample)
    return Score(float(is_right), {"has_answer": has_answer})
