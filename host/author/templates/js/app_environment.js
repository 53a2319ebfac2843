// {{name}}: the model guesses a number and hears whether it is higher or lower.

import { definePlugin, system, user } from "./sdk/cosmos-plugin.js";

export default definePlugin({
  name: "{{name}}",
  version: "0.1.0",
  summary: "guess a number",
  // What a run may set in `[custom.{{name}}]`.
  settings: {
    guesses: { type: "integer", default: 5, minimum: 1, maximum: 100, description: "How many guesses the model has." },
  },
  environments: {
    // Nothing is kept between calls but what travels in `state`.
    "{{name}}": {
      open: ({ guesses }) => ({
        // `start.reference` is what the dataset gave as the example's reference: the number.
        reset(start) {
          const rules = system(`Guess the number. You have ${guesses} guesses; say just the number.`);
          return { messages: [rules, ...start.messages], state: { number: start.reference } };
        },
        step({ completion, turn, state }) {
          const found = /-?\d+/.exec(completion);
          const guess = found === null ? null : Number(found[0]);
          const metrics = { guesses: turn + 1 };
          if (guess === state.number) return { done: true, reward: 1, metrics };
          if (turn + 1 >= guesses) return { done: true, metrics };
          if (guess === null) return { messages: [user("That is no number.")], state };
          return { messages: [user(guess < state.number ? "higher" : "lower")], state };
        },
      }),
    },
  },
});
