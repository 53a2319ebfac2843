// The reward: finds the code in a completion and runs it against the reference's tests.

#include "language.h"

static const cosmos_offer rewards[] = {{"unit-test", COSMOS_TRAIN}, {"unit-test", COSMOS_VALIDATION}, {0}};

const cosmos_description cosmos_plugin = {
    .name = "unit-test",
    .version = "0.2.0",
    .summary = "runs the completion's function against test cases; the score is the fraction that passes",
    .rewards = rewards,
};

enum { TESTS_MAX = 1000 };

const char *cosmos_reward_init(cosmos_text name, cosmos_text settings) {
  (void)name, (void)settings;
  return NULL;
}

static cosmos_text from(cosmos_text text, ptrdiff_t start) {
  return cosmos_text_part(text, (size_t)start, text.len);
}

// The last block between ``` that is closed; its first line may name a language.
static bool last_block(cosmos_text text, cosmos_text *code) {
  bool found = false;
  ptrdiff_t open, line, close;
  while ((open = cosmos_text_find(text, "```")) >= 0) {
    text = from(text, open + 3);
    if ((line = cosmos_text_find(text, "\n")) < 0) break;
    text = from(text, line + 1);
    if ((close = cosmos_text_find(text, "```")) < 0) break;
    *code = cosmos_text_part(text, 0, (size_t)close);
    text = from(text, close + 3);
    found = true;
  }
  return found;
}

// Everything from the first line that begins with `def`.
static bool from_first_definition(cosmos_text text, cosmos_text *code) {
  while (text.len) {
    if (cosmos_text_is(cosmos_text_part(text, 0, 4), "def ")) {
      *code = text;
      return true;
    }
    ptrdiff_t line = cosmos_text_find(text, "\n");
    if (line < 0) break;
    text = from(text, line + 1);
  }
  return false;
}

static bool whole_number(cosmos_json value, int64_t *number) {
  double given;
  // Above 2^53 a double is no longer exact.
  if (!cosmos_json_number(value, &given) || given < -9007199254740992.0 || given > 9007199254740992.0) return false;
  *number = (int64_t)given;
  return (double)*number == given;
}

// Whether the function passes one test; false in `*broken` stays when the test itself is in order.
static bool passes(const program *code, int tested, cosmos_json test, bool *broken) {
  cosmos_json in, out, item;
  int64_t arguments[PARAMETERS_MAX], wanted, result;
  int count = 0;
  const char *place = NULL;
  *broken = true;
  if (!cosmos_json_get(test, "in", &in) || cosmos_json_kind_of(in) != COSMOS_JSON_LIST) return false;
  if (!cosmos_json_get(test, "out", &out) || !whole_number(out, &wanted)) return false;
  while (cosmos_json_next(in, &place, &item))
    if (count == PARAMETERS_MAX || !whole_number(item, &arguments[count++])) return false;
  *broken = false;
  if (tested < 0 || code->functions[tested].parameters != count) return false;
  return run(code, tested, arguments, &result) == RAN && result == wanted;
}

const char *cosmos_reward_score(const cosmos_sample *sample, cosmos_score *score) {
  cosmos_json reference, name, tests, test;
  cosmos_text function_name, source;
  if (!cosmos_json_read(sample->reference, &reference) || !cosmos_json_get(reference, "function", &name) ||
      !cosmos_json_text(name, &function_name) || !cosmos_json_get(reference, "tests", &tests) ||
      cosmos_json_kind_of(tests) != COSMOS_JSON_LIST)
    return "the reference is not {\"function\": \"name\", \"tests\": [{\"in\": [numbers], \"out\": number}, ...]}";
  // Too large for the stack, and used by one call at a time.
  static program code;
  bool has_code = last_block(sample->completion, &source) || from_first_definition(sample->completion, &source);
  bool parsed = has_code && parse(source, &code) == NULL;
  int tested = parsed ? find_function(&code, function_name) : -1;
  int passed = 0, count = 0;
  for (const char *place = NULL; cosmos_json_next(tests, &place, &test); count++) {
    bool broken;
    if (count == TESTS_MAX) return cosmos_format("the reference has more than %d tests", TESTS_MAX);
    passed += passes(&code, tested, test, &broken);
    if (broken) return cosmos_format("test %d of the reference is broken", count + 1);
  }
  if (count == 0) return "the reference has no tests";
  score->value = (double)passed / count;
  cosmos_metric(&score->metrics, "passed", passed);
  cosmos_metric(&score->metrics, "failed", count - passed);
  cosmos_metric(&score->metrics, "parsed", parsed);
  return NULL;
}
