// Tests of the SDK on this machine itself; test.sh compiles them with the sanitizers, which find what is read past its
// end, freed twice or never.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bindings.h"
#include "cosmos_plugin.h"

#define CHECK(what) ((what) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), exit(1)))

// ---- a plugin of everything -----------------------------------------------------------------------------------------------

static const cosmos_offer offers[] = {{"one", COSMOS_TRAIN}, {"two", COSMOS_VALIDATION}, {0}};
static const char *const wants[] = {"log", "table", NULL};
const cosmos_description cosmos_plugin = {
    .name = "test", .version = "1", .summary = "all", .datasets = offers, .rewards = offers, .environments = offers, .wants = wants};

const char *cosmos_reward_init(cosmos_text name, cosmos_text settings) {
  (void)settings;
  return cosmos_text_is(name, "one") ? NULL : cosmos_format("no reward `%.*s`", (int)name.len, name.data);
}

const char *cosmos_reward_score(const cosmos_sample *sample, cosmos_score *score) {
  for (int i = 0; i < 5; i++) cosmos_metric(&score->metrics, cosmos_format("m%d", i), i);
  if (sample->completion.len == 0) return cosmos_format("%s is empty", "it");
  score->value = (double)sample->completion.len + (double)cosmos_meta(sample->metadata, "key").len;
  return NULL;
}

const char *cosmos_dataset_init(cosmos_text name, cosmos_text settings) { return (void)name, (void)settings, NULL; }
const char *cosmos_dataset_len(uint64_t *len) { return *len = 3, NULL; }

const char *cosmos_dataset_get(uint64_t index, cosmos_example *example) {
  if (index == 1) return NULL; // without a prompt
  cosmos_example_prompt(example, cosmos_text_of("replaced"));
  if (index == 2) cosmos_example_prompt(example, cosmos_text_of("asked"));
  for (int i = 0; index == 0 && i < 3; i++) cosmos_example_message(example, "user", cosmos_text_of("asked"));
  cosmos_example_reference_json(example, cosmos_text_of("1"));
  cosmos_example_reference_text(example, cosmos_text_of("a \"b\"\n\\\x01\xc3\xa9"));
  cosmos_example_response(example, cosmos_text_of("said"));
  cosmos_example_meta(example, "key", cosmos_text_of("value"));
  return NULL;
}

const char *cosmos_environment_init(cosmos_text name, cosmos_text settings) { return (void)name, (void)settings, NULL; }

const char *cosmos_environment_reset(const cosmos_start *start, cosmos_answer *answer) {
  cosmos_say(answer, cosmos_text_of("system"), start->reference);
  cosmos_metric(&answer->metrics, "lost", 1); // an opening has no metrics
  answer->state = cosmos_text_of(cosmos_format("%zu", start->messages.len));
  return NULL;
}

const char *cosmos_environment_step(const cosmos_action *action, cosmos_answer *answer) {
  cosmos_say(answer, cosmos_text_of("user"), action->completion);
  cosmos_metric(&answer->metrics, "turn", action->turn);
  answer->state = action->state;
  return action->complete ? NULL : "cut off";
}

// The bindings' imports have no host here.
void __wasm_import_cosmos_plugin_log_write(int32_t a, uint8_t *b, size_t c) { (void)a, (void)b, (void)c; }
int64_t __wasm_import_cosmos_plugin_table_method_rows_len(int32_t a) { return (void)a, 0; }
void __wasm_import_cosmos_plugin_table_method_rows_columns(int32_t a, uint8_t *b) { (void)a, (void)b; }
void __wasm_import_cosmos_plugin_table_method_rows_read(int32_t a, int64_t b, int32_t c, uint8_t *d, size_t e, uint8_t *f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
}
void __wasm_import_cosmos_plugin_table_open(uint8_t *a, size_t b, uint8_t *c, size_t d, uint8_t *e, size_t f, uint8_t *g, size_t h, uint8_t *i) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h, (void)i;
}
void __wasm_import_cosmos_plugin_chat_template_render(uint8_t *a, size_t b, int32_t c, uint8_t *d, size_t e, uint8_t *f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
}
void __wasm_import_cosmos_plugin_table_rows_drop(int32_t a) { (void)a; }

// ---- tests ----------------------------------------------------------------------------------------------------------------

static cosmos_string_t given(const char *text) {
  cosmos_string_t made;
  cosmos_string_dup(&made, text);
  return made;
}

static void test_reward(void) {
  cosmos_string_t name = given("two"), settings = given("{}"), err;
  CHECK(!exports_cosmos_plugin_reward_init(&name, &settings, &err));
  CHECK(err.len == 15 && !memcmp(err.ptr, "no reward `two`", 15));
  cosmos_string_free(&err);
  name = given("one"), settings = given("{}");
  CHECK(exports_cosmos_plugin_reward_init(&name, &settings, &err));

  exports_cosmos_plugin_reward_list_sample_t samples = {calloc(2, sizeof *samples.ptr), 2};
  samples.ptr[0].completion = given("four");
  samples.ptr[0].metadata.ptr = malloc(sizeof *samples.ptr[0].metadata.ptr);
  samples.ptr[0].metadata.len = 1;
  samples.ptr[0].metadata.ptr[0].key = given("key");
  samples.ptr[0].metadata.ptr[0].value = given("value");
  exports_cosmos_plugin_reward_list_result_score_sample_error_t scores;
  exports_cosmos_plugin_reward_score_batch(&samples, &scores);
  CHECK(scores.len == 2 && !scores.ptr[0].is_err && scores.ptr[0].val.ok.value == 9.0);
  CHECK(scores.ptr[0].val.ok.metrics.len == 5 && scores.ptr[0].val.ok.metrics.ptr[4].value == 4.0);
  CHECK(scores.ptr[1].is_err && scores.ptr[1].val.err.message.len == 11);
  exports_cosmos_plugin_reward_list_result_score_sample_error_free(&scores);
}

static void test_dataset(void) {
  cosmos_list_u64_t indices = {malloc(4 * sizeof(uint64_t)), 4};
  for (uint64_t i = 0; i < 4; i++) indices.ptr[i] = i;
  exports_cosmos_plugin_dataset_list_result_example_sample_error_t examples;
  exports_cosmos_plugin_dataset_get_batch(&indices, &examples);
  CHECK(examples.len == 4 && examples.ptr[1].is_err && examples.ptr[3].is_err);
  CHECK(examples.ptr[0].val.ok.prompt.val.messages.len == 3);
  CHECK(examples.ptr[2].val.ok.prompt.val.text.len == 5);
  const cosmos_string_t *reference = &examples.ptr[0].val.ok.reference.val;
  const char wanted[] = "\"a \\\"b\\\"\\u000a\\\\\\u0001\xc3\xa9\"";
  CHECK(reference->len == sizeof wanted - 1 && !memcmp(reference->ptr, wanted, reference->len));
  exports_cosmos_plugin_dataset_list_result_example_sample_error_free(&examples);
}

static void test_environment(void) {
  exports_cosmos_plugin_environment_list_start_t starts = {calloc(1, sizeof *starts.ptr), 1};
  starts.ptr[0].reference = given("7");
  exports_cosmos_plugin_environment_list_result_opened_sample_error_t opened;
  exports_cosmos_plugin_environment_reset_batch(&starts, &opened);
  CHECK(opened.len == 1 && opened.ptr[0].val.ok.messages.len == 1 && opened.ptr[0].val.ok.state.len == 1);
  exports_cosmos_plugin_environment_list_result_opened_sample_error_free(&opened);

  exports_cosmos_plugin_environment_list_action_t actions = {calloc(2, sizeof *actions.ptr), 2};
  actions.ptr[0].completion = given("more");
  actions.ptr[0].complete = true;
  exports_cosmos_plugin_environment_list_result_outcome_sample_error_t outcomes;
  exports_cosmos_plugin_environment_step_batch(&actions, &outcomes);
  CHECK(!outcomes.ptr[0].is_err && outcomes.ptr[0].val.ok.metrics.len == 1 && outcomes.ptr[1].is_err);
  exports_cosmos_plugin_environment_list_result_outcome_sample_error_free(&outcomes);
}

static void test_metadata(void) {
  exports_cosmos_plugin_metadata_description_t description;
  exports_cosmos_plugin_metadata_describe(&description);
  CHECK(description.rewards.len == 2 && description.environments.len == 2 && description.wants.len == 2);
  exports_cosmos_plugin_metadata_description_free(&description);
  cosmos_list_string_free(&description.wants); // which the generated function above forgets; the component does not call it
}

static void test_json(void) {
  static const char *const wrong[] = {
      "", " ", "{", "[", "\"", "\"\\", "\"\\u12\"", "\"\\x\"", "\"\n\"", "tru", "nul", "-", "01", "1.", "1e", ".5", "[1,]",
      "[,]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{a:1}", "1 2", "[1}", "'a'", "+1", "NaN",
  };
  cosmos_json value, item;
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    // In memory of its own length, so that reading past the end is seen.
    size_t len = strlen(wrong[i]);
    char *copy = malloc(len ? len : 1);
    memcpy(copy, wrong[i], len);
    CHECK(!cosmos_json_read((cosmos_text){copy, len}, &value));
    free(copy);
  }
  char deep[400];
  memset(deep, '[', 200), memset(deep + 200, ']', 200);
  CHECK(!cosmos_json_read((cosmos_text){deep, 400}, &value));

  static const char text[] = " {\"a\": [1, -2.5e1, \"x\\n\\u00e9\\ud83d\\ude00\\ud83d\", [], {}], \"b\": {\"c\": true, \"d\": null}} ";
  cosmos_json whole;
  double number;
  bool answer;
  cosmos_text read;
  const char *place = NULL;
  CHECK(cosmos_json_read(cosmos_text_of(text), &whole) && cosmos_json_kind_of(whole) == COSMOS_JSON_OBJECT);
  CHECK(cosmos_json_get(whole, "a", &value) && !cosmos_json_get(whole, "c", &item));
  CHECK(cosmos_json_next(value, &place, &item) && cosmos_json_number(item, &number) && number == 1);
  CHECK(cosmos_json_next(value, &place, &item) && cosmos_json_number(item, &number) && number == -25);
  CHECK(cosmos_json_next(value, &place, &item) && cosmos_json_text(item, &read) && !cosmos_json_number(item, &number));
  CHECK(cosmos_text_is(read, "x\n\xc3\xa9\xf0\x9f\x98\x80\xef\xbf\xbd"));
  CHECK(cosmos_json_next(value, &place, &item) && cosmos_json_next(value, &place, &item));
  CHECK(!cosmos_json_next(value, &place, &item));
  CHECK(cosmos_json_path(whole, "b.c", &value) && cosmos_json_bool(value, &answer) && answer);
  CHECK(cosmos_json_path(whole, "b.d", &value) && cosmos_json_kind_of(value) == COSMOS_JSON_NULL);
  CHECK(!cosmos_json_path(whole, "a.c", &value));
  CHECK(cosmos_text_is(cosmos_reference_text(cosmos_text_of("\"yes\"")), "yes"));
  CHECK(cosmos_text_is(cosmos_reference_text(cosmos_text_of("72")), "72"));
}

// Any bytes: the reader ends within them. The sanitizers say when it does not.
static void test_json_on_noise(void) {
  static const char parts[] = "{}[]\",:\\u0123e-+.tfn\xc3\xa9 ";
  uint32_t seed = 1;
  for (int round = 0; round < 200000; round++) {
    char noise[24];
    size_t len = round % sizeof noise;
    for (size_t i = 0; i < len; i++) noise[i] = parts[(seed = seed * 1664525 + 1013904223) >> 8 & 0xffff ? (seed >> 8) % (sizeof parts - 1) : 0];
    char *copy = malloc(len ? len : 1);
    memcpy(copy, noise, len);
    cosmos_json value, item;
    cosmos_text text;
    const char *place = NULL;
    if (cosmos_json_read((cosmos_text){copy, len}, &value)) {
      cosmos_json_text(value, &text);
      cosmos_json_get(value, "e", &item);
      while (cosmos_json_next(value, &place, &item)) cosmos_json_text(item, &text);
    }
    free(copy);
  }
}

static void test_texts(void) {
  cosmos_text text = cosmos_text_of("  a b ");
  CHECK(cosmos_text_is(cosmos_text_trim(text), "a b") && cosmos_text_find(text, "b") == 4 && cosmos_text_find(text, "c") == -1);
  CHECK(cosmos_text_part(text, 9, 1).len == 0 && cosmos_text_is(cosmos_text_part(text, 2, 1), "a"));
}

int main(void) {
  test_texts();
  test_json();
  test_json_on_noise();
  test_metadata();
  test_dataset();
  test_environment();
  test_reward(); // the last one: its end frees what the tests above took with cosmos_alloc
  puts("the C SDK's tests passed");
  return 0;
}
