// A reward: 1 when the last number of the completion is the reference's.

#include <stdlib.h>

#include "cosmos_plugin.h"

static const cosmos_offer rewards[] = {{"{{name}}", COSMOS_TRAIN}, {"{{name}}", COSMOS_VALIDATION}, {0}};

const cosmos_description cosmos_plugin = {
    .name = "{{name}}",
    .version = "0.1.0",
    .summary = "is the last number the right one?",
    .rewards = rewards,
};

const char *cosmos_reward_init(cosmos_text name, cosmos_text settings) {
  (void)name, (void)settings;
  return NULL;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The last number in `text`; commas between digits do not count.
static bool last_number(cosmos_text text, double *number) {
  enum { DIGITS_MAX = 64 };
  bool found = false;
  for (size_t at = 0; at < text.len;) {
    char digits[DIGITS_MAX + 1];
    size_t len = 0;
    if (text.data[at] == '-') digits[len++] = text.data[at++];
    size_t first = at;
    while (at < text.len && (is_digit(text.data[at]) || text.data[at] == ',' || text.data[at] == '.')) {
      if (text.data[at] != ',' && len < DIGITS_MAX) digits[len++] = text.data[at];
      at++;
    }
    digits[len] = 0;
    if (at > first && is_digit(text.data[first])) {
      *number = strtod(digits, NULL);
      found = true;
    }
    if (at == first) at++;
  }
  return found;
}

const char *cosmos_reward_score(const cosmos_sample *sample, cosmos_score *score) {
  double wanted, found = 0;
  if (!last_number(cosmos_reference_text(sample->reference), &wanted)) return "the reference is no number";
  bool answered = last_number(sample->completion, &found);
  score->value = answered && found == wanted;
  cosmos_metric(&score->metrics, "answered", answered);
  return NULL;
}
