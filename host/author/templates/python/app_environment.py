"""{{name}}: the model guesses a number and hears whether it is higher or lower."""

import re
from dataclasses import dataclass

from cosmos_plugin import Action, Opened, Outcome, Settings, Start, environment, option, plugin, system, user


@dataclass
class Options:
    """What a run may set in `[custom.{{name}}]`."""

    guesses: int = option(5, help="How many guesses the model has.", minimum=1, maximum=100)


plugin(name="{{name}}", version="0.1.0", summary="guess a number", options=Options)

NUMBER = re.compile(r"-?\d+")


@environment("{{name}}")
class Guess:
    """Nothing is kept between calls but what travels in `state`."""

    def __init__(self, settings: Settings) -> None:
        self.guesses = settings.own(Options).guesses

    def reset(self, start: Start) -> Opened:
        """`start.reference` is what the dataset gave as the example's reference: the number."""
        rules = system(f"Guess the number. You have {self.guesses} guesses; say just the number.")
        return Opened([rules, *start.messages], state={"number": start.reference})

    def step(self, action: Action) -> Outcome:
        found = NUMBER.search(action.completion)
        number = action.state["number"]
        if found and int(found.group()) == number:
            return Outcome(done=True, reward=1.0, metrics={"guesses": action.turn + 1})
        if action.turn + 1 >= self.guesses:
            return Outcome(done=True, metrics={"guesses": action.turn + 1})
        if not found:
            return Outcome([user("That is no number.")], state=action.state)
        return Outcome([user("higher" if int(found.group()) < number else "lower")], state=action.state)
