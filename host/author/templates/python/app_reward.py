"""{{name}}: is the answer between <answer> and </answer> the right one?"""

import re
from dataclasses import dataclass

from cosmos_plugin import Sample, Score, Settings, option, plugin, reward


@dataclass
class Options:
    """What a run may set in `[custom.{{name}}]`."""

    form_credit: float = option(0.1, help="Score of a wrong answer in the right form.", minimum=0, maximum=1)


plugin(name="{{name}}", version="0.1.0", summary="rewards the right answer", options=Options)

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@reward("{{name}}", role="train")
def score(sample: Sample, settings: Settings) -> Score:
    """`sample.reference` is what the dataset gave as the example's reference."""
    options = settings.own(Options)
    answers = ANSWER.findall(sample.completion)
    if not answers:
        return Score(0.0, {"has_answer": 0})
    right = answers[-1].strip() == str(sample.reference)
    return Score(1.0 if right else options.form_credit, {"has_answer": 1})
