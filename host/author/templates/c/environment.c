// An environment: the model guesses a hidden number and hears whether it is larger or smaller.
//
// The example's reference is the number. Nothing is kept here between the steps: what must be remembered travels in the
// state, so that any instance of the plugin can go on with any conversation.

#include <stdlib.h>

#include "cosmos_plugin.h"

enum { GUESSES_MAX = 8 };

static const cosmos_offer environments[] = {{"{{name}}", COSMOS_TRAIN}, {0}};

const cosmos_description cosmos_plugin = {
    .name = "{{name}}",
    .version = "0.1.0",
    .summary = "guess a number",
    .environments = environments,
};

const char *cosmos_environment_init(cosmos_text name, cosmos_text settings) {
  (void)name, (void)settings;
  return NULL;
}

// The last whole number in `text`.
static bool last_integer(cosmos_text text, long *number) {
  bool found = false;
  for (size_t at = 0; at < text.len;) {
    bool negative = text.data[at] == '-';
    size_t first = at + negative, end = first;
    long value = 0;
    while (end < text.len && text.data[end] >= '0' && text.data[end] <= '9') {
      if (value < 100000000) value = 10 * value + (text.data[end] - '0');
      end++;
    }
    if (end > first) {
      *number = negative ? -value : value;
      found = true;
    }
    at = end > at ? end : at + 1;
  }
  return found;
}

const char *cosmos_environment_reset(const cosmos_start *start, cosmos_answer *answer) {
  long hidden;
  if (!last_integer(cosmos_reference_text(start->reference), &hidden)) return "the reference is no number";
  const char *rules = cosmos_format("Guess my number. You have %d guesses.", GUESSES_MAX);
  cosmos_say(answer, cosmos_text_of("system"), cosmos_text_of(rules));
  for (size_t i = 0; i < start->messages.len; i++)
    cosmos_say(answer, start->messages.items[i].role, start->messages.items[i].content);
  answer->state = cosmos_text_of(cosmos_format("%ld", hidden));
  return NULL;
}

const char *cosmos_environment_step(const cosmos_action *action, cosmos_answer *answer) {
  long hidden, guess = 0;
  if (!last_integer(action->state, &hidden)) return "the state is no number";
  bool guessed = last_integer(action->completion, &guess);
  uint32_t guesses = action->turn + 1;
  answer->reward = guessed && guess == hidden;
  answer->done = answer->reward > 0 || guesses == GUESSES_MAX || !action->complete;
  if (answer->done) {
    cosmos_metric(&answer->metrics, "guesses", guesses);
    return NULL;
  }
  const char *told = !guessed ? "That is no number." : guess < hidden ? "Larger." : "Smaller.";
  cosmos_say(answer, cosmos_text_of("user"), cosmos_text_of(told));
  answer->state = action->state;
  return NULL;
}
