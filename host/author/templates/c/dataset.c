// A dataset: sums of two numbers below 100. Every index is another one.

#include "cosmos_plugin.h"

enum { NUMBERS = 100 };

static const cosmos_offer datasets[] = {{"{{name}}", COSMOS_TRAIN}, {0}};

const cosmos_description cosmos_plugin = {
    .name = "{{name}}",
    .version = "0.1.0",
    .summary = "sums of two numbers",
    .datasets = datasets,
};

const char *cosmos_dataset_init(cosmos_text name, cosmos_text settings) {
  (void)name, (void)settings;
  return NULL;
}

const char *cosmos_dataset_len(uint64_t *len) {
  *len = NUMBERS * NUMBERS;
  return NULL;
}

const char *cosmos_dataset_get(uint64_t index, cosmos_example *example) {
  int a = (int)(index / NUMBERS), b = (int)(index % NUMBERS);
  const char *question = cosmos_format("What is %d + %d? End with the number.", a, b);
  cosmos_example_message(example, "user", cosmos_text_of(question));
  cosmos_example_reference_json(example, cosmos_text_of(cosmos_format("%d", a + b)));
  return NULL;
}
