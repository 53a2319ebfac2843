// From the generated bindings to the functions of cosmos_plugin.h.

#include "cosmos_plugin.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bindings.h"

// ---- memory of the present call ---------------------------------------------------------------------------------------

typedef struct block {
  struct block *next;
  max_align_t content[];
} block;

static block *blocks;

static void *owned_bytes(size_t bytes) {
  // What is empty is never freed by the generated code.
  static max_align_t nothing;
  if (bytes == 0) return &nothing;
  void *memory = malloc(bytes);
  if (!memory) abort();
  return memory;
}

void *cosmos_alloc(size_t bytes) {
  if (bytes > PTRDIFF_MAX - sizeof(block)) abort();
  block *made = owned_bytes(sizeof(block) + bytes);
  made->next = blocks;
  blocks = made;
  return made->content;
}

static void free_blocks(void) {
  while (blocks) {
    block *next = blocks->next;
    free(blocks);
    blocks = next;
  }
}

// ---- texts ------------------------------------------------------------------------------------------------------------

cosmos_text cosmos_text_of(const char *text) {
  return text ? (cosmos_text){text, strlen(text)} : (cosmos_text){"", 0};
}

bool cosmos_text_is(cosmos_text text, const char *other) {
  size_t len = strlen(other);
  return text.len == len && memcmp(text.data, other, len) == 0;
}

cosmos_text cosmos_text_part(cosmos_text text, size_t start, size_t len) {
  if (start >= text.len) return (cosmos_text){"", 0};
  size_t left = text.len - start;
  return (cosmos_text){text.data + start, len < left ? len : left};
}

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

cosmos_text cosmos_text_trim(cosmos_text text) {
  while (text.len && is_space(text.data[0])) text.data++, text.len--;
  while (text.len && is_space(text.data[text.len - 1])) text.len--;
  return text;
}

ptrdiff_t cosmos_text_find(cosmos_text text, const char *needle) {
  size_t len = strlen(needle);
  for (size_t at = 0; at + len <= text.len; at++)
    if (memcmp(text.data + at, needle, len) == 0) return (ptrdiff_t)at;
  return -1;
}

static const char *format_list(const char *format, va_list list) {
  va_list again;
  va_copy(again, list);
  int len = vsnprintf(NULL, 0, format, again);
  va_end(again);
  if (len < 0) return "(a text that cannot be formatted)";
  char *text = cosmos_alloc((size_t)len + 1);
  vsnprintf(text, (size_t)len + 1, format, list);
  return text;
}

const char *cosmos_format(const char *format, ...) {
  va_list list;
  va_start(list, format);
  const char *text = format_list(format, list);
  va_end(list);
  return text;
}

// ---- JSON -------------------------------------------------------------------------------------------------------------

enum { JSON_DEPTH_MAX = 64, JSON_NUMBER_BYTES_MAX = 400 };

static const char *skip_space(const char *at, const char *end) {
  while (at < end && is_space(*at)) at++;
  return at;
}

static const char *skip_digits(const char *at, const char *end) {
  while (at < end && *at >= '0' && *at <= '9') at++;
  return at;
}

static const char *skip_word(const char *at, const char *end, const char *word) {
  size_t len = strlen(word);
  return (size_t)(end - at) >= len && memcmp(at, word, len) == 0 ? at + len : NULL;
}

static const char *skip_number(const char *at, const char *end) {
  if (at < end && *at == '-') at++;
  const char *whole = at;
  at = skip_digits(at, end);
  if (at == whole || (at - whole > 1 && *whole == '0')) return NULL;
  if (at < end && *at == '.') {
    const char *fraction = ++at;
    if ((at = skip_digits(at, end)) == fraction) return NULL;
  }
  if (at < end && (*at == 'e' || *at == 'E')) {
    at++;
    if (at < end && (*at == '+' || *at == '-')) at++;
    const char *exponent = at;
    if ((at = skip_digits(at, end)) == exponent) return NULL;
  }
  return at;
}

// The value of four hexadecimal digits, or -1.
static int32_t hex4(const char *at, const char *end) {
  if (end - at < 4) return -1;
  int32_t value = 0;
  for (int i = 0; i < 4; i++) {
    char c = at[i];
    int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

static const char *skip_text(const char *at, const char *end) {
  for (at++; at < end; at++) {
    if (*at == '"') return at + 1;
    if ((unsigned char)*at < 0x20) return NULL;
    if (*at != '\\') continue;
    if (++at == end) return NULL;
    if (*at == 'u') {
      if (hex4(at + 1, end) < 0) return NULL;
      at += 4;
    } else if (!strchr("\"\\/bfnrt", *at)) {
      return NULL;
    }
  }
  return NULL;
}

// The end of the value at `at`, or NULL.
static const char *skip_value(const char *at, const char *end, int depth) {
  at = skip_space(at, end);
  if (at == end || depth == 0) return NULL;
  char open = *at, close = open == '{' ? '}' : ']';
  switch (open) {
  case '"': return skip_text(at, end);
  case 't': return skip_word(at, end, "true");
  case 'f': return skip_word(at, end, "false");
  case 'n': return skip_word(at, end, "null");
  case '{':
  case '[': break;
  default: return skip_number(at, end);
  }
  at = skip_space(at + 1, end);
  if (at < end && *at == close) return at + 1;
  for (;;) {
    if (open == '{') {
      at = skip_space(at, end);
      if (at == end || *at != '"' || !(at = skip_text(at, end))) return NULL;
      at = skip_space(at, end);
      if (at == end || *at++ != ':') return NULL;
    }
    if (!(at = skip_value(at, end, depth - 1))) return NULL;
    at = skip_space(at, end);
    if (at == end) return NULL;
    if (*at == close) return at + 1;
    if (*at++ != ',') return NULL;
  }
}

bool cosmos_json_read(cosmos_text text, cosmos_json *value) {
  const char *end = text.data + text.len, *after = skip_value(text.data, end, JSON_DEPTH_MAX);
  if (!after || skip_space(after, end) != end) return false;
  *value = (cosmos_json){skip_space(text.data, end), after};
  return true;
}

cosmos_json_kind cosmos_json_kind_of(cosmos_json value) {
  switch (*value.at) {
  case 'n': return COSMOS_JSON_NULL;
  case 't':
  case 'f': return COSMOS_JSON_BOOL;
  case '"': return COSMOS_JSON_TEXT;
  case '[': return COSMOS_JSON_LIST;
  case '{': return COSMOS_JSON_OBJECT;
  default: return COSMOS_JSON_NUMBER;
  }
}

bool cosmos_json_bool(cosmos_json value, bool *answer) {
  if (cosmos_json_kind_of(value) != COSMOS_JSON_BOOL) return false;
  *answer = *value.at == 't';
  return true;
}

bool cosmos_json_number(cosmos_json value, double *number) {
  size_t len = (size_t)(value.end - value.at);
  if (cosmos_json_kind_of(value) != COSMOS_JSON_NUMBER || len > JSON_NUMBER_BYTES_MAX) return false;
  char digits[JSON_NUMBER_BYTES_MAX + 1];
  memcpy(digits, value.at, len);
  digits[len] = 0;
  *number = strtod(digits, NULL);
  return isfinite(*number);
}

static char *put_utf8(char *to, uint32_t c) {
  if (c < 0x80) {
    *to++ = (char)c;
  } else if (c < 0x800) {
    *to++ = (char)(0xc0 | c >> 6);
    *to++ = (char)(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    *to++ = (char)(0xe0 | c >> 12);
    *to++ = (char)(0x80 | (c >> 6 & 0x3f));
    *to++ = (char)(0x80 | (c & 0x3f));
  } else {
    *to++ = (char)(0xf0 | c >> 18);
    *to++ = (char)(0x80 | (c >> 12 & 0x3f));
    *to++ = (char)(0x80 | (c >> 6 & 0x3f));
    *to++ = (char)(0x80 | (c & 0x3f));
  }
  return to;
}

// Takes `\uXXXX`, two of them for what UTF-16 writes with two; `*at` stands on the u and then on the last digit.
static uint32_t escaped(const char **at, const char *end) {
  uint32_t c = (uint32_t)hex4(*at + 1, end);
  *at += 4;
  if (c >= 0xd800 && c < 0xdc00 && end - *at > 6 && (*at)[1] == '\\' && (*at)[2] == 'u') {
    int32_t low = hex4(*at + 3, end);
    if (low >= 0xdc00 && low < 0xe000) {
      *at += 6;
      return 0x10000 + ((c - 0xd800) << 10) + ((uint32_t)low - 0xdc00);
    }
  }
  return c >= 0xd800 && c < 0xe000 ? 0xfffd : c;
}

bool cosmos_json_text(cosmos_json value, cosmos_text *text) {
  if (cosmos_json_kind_of(value) != COSMOS_JSON_TEXT) return false;
  // Unescaped it is never longer.
  char *made = cosmos_alloc((size_t)(value.end - value.at)), *to = made;
  for (const char *at = value.at + 1; at < value.end - 1; at++) {
    if (*at != '\\') {
      *to++ = *at;
      continue;
    }
    static const char names[] = "bfnrt", meanings[] = "\b\f\n\r\t";
    const char *name = strchr(names, *++at);
    if (*at == 'u')
      to = put_utf8(to, escaped(&at, value.end));
    else
      *to++ = name ? meanings[name - names] : *at;
  }
  *text = (cosmos_text){made, (size_t)(to - made)};
  return true;
}

bool cosmos_json_get(cosmos_json object, const char *key, cosmos_json *value) {
  if (cosmos_json_kind_of(object) != COSMOS_JSON_OBJECT) return false;
  const char *at = skip_space(object.at + 1, object.end);
  // cosmos_json_read checked every step below.
  while (*at != '}') {
    cosmos_json name = {at, skip_text(at, object.end)};
    const char *start = skip_space(skip_space(name.end, object.end) + 1, object.end);
    const char *end = skip_value(start, object.end, JSON_DEPTH_MAX);
    cosmos_text text;
    if (cosmos_json_text(name, &text) && cosmos_text_is(text, key)) {
      *value = (cosmos_json){start, end};
      return true;
    }
    at = skip_space(end, object.end);
    if (*at == ',') at = skip_space(at + 1, object.end);
  }
  return false;
}

bool cosmos_json_path(cosmos_json object, const char *path, cosmos_json *value) {
  const char *dot;
  *value = object;
  while ((dot = strchr(path, '.'))) {
    if (!cosmos_json_get(*value, cosmos_format("%.*s", (int)(dot - path), path), value)) return false;
    path = dot + 1;
  }
  return cosmos_json_get(*value, path, value);
}

bool cosmos_json_next(cosmos_json list, const char **place, cosmos_json *item) {
  if (cosmos_json_kind_of(list) != COSMOS_JSON_LIST) return false;
  const char *at = skip_space(*place ? *place : list.at + 1, list.end);
  if (*at == ',') at = skip_space(at + 1, list.end);
  if (*at == ']') return false;
  *item = (cosmos_json){at, skip_value(at, list.end, JSON_DEPTH_MAX)};
  *place = item->end;
  return true;
}

cosmos_text cosmos_reference_text(cosmos_text reference) {
  cosmos_json value;
  cosmos_text text;
  return cosmos_json_read(reference, &value) && cosmos_json_text(value, &text) ? text : reference;
}

// ---- to and from the bindings -------------------------------------------------------------------------------------------

static cosmos_text lent(cosmos_string_t text) { return (cosmos_text){text.len ? (const char *)text.ptr : "", text.len}; }

// What goes to the host is freed after the host has read it.
static cosmos_string_t owned(cosmos_text text) {
  cosmos_string_t made = {owned_bytes(text.len), text.len};
  if (text.len) memcpy(made.ptr, text.data, text.len);
  return made;
}

static cosmos_string_t owned_of(const char *text) { return owned(cosmos_text_of(text)); }

// Makes room for one more in a list that is handed to the host. Lists grow by doubling.
__attribute__((unused)) static void *grown(void *items, size_t len, size_t item_bytes) {
  if (len & (len - 1)) return items;
  void *more = realloc(items, (len ? 2 * len : 1) * item_bytes);
  if (!more) abort();
  return more;
}

__attribute__((unused)) static cosmos_metadata metadata_of(const cosmos_plugin_types_string_pair_t *pairs, size_t len) {
  cosmos_pair *items = cosmos_alloc(len * sizeof *items);
  for (size_t i = 0; i < len; i++) items[i] = (cosmos_pair){lent(pairs[i].key), lent(pairs[i].value)};
  return (cosmos_metadata){items, len};
}

cosmos_text cosmos_meta(cosmos_metadata metadata, const char *key) {
  for (size_t i = 0; i < metadata.len; i++)
    if (cosmos_text_is(metadata.items[i].key, key)) return metadata.items[i].value;
  return (cosmos_text){"", 0};
}

void cosmos_metric(cosmos_metrics *metrics, const char *name, double value) {
  cosmos_plugin_types_metric_t *items = grown(metrics->items, metrics->len, sizeof *items);
  items[metrics->len++] = (cosmos_plugin_types_metric_t){owned_of(name), value};
  metrics->items = items;
}

__attribute__((unused)) static void free_metrics(cosmos_metrics metrics) {
  cosmos_plugin_types_metric_t *items = metrics.items;
  for (size_t i = 0; i < metrics.len; i++) cosmos_string_free(&items[i].name);
  free(items);
}

// Ends an `init`: true when all went well, else the error is handed over.
__attribute__((unused)) static bool answered(const char *error, cosmos_string_t *name, cosmos_string_t *settings, cosmos_string_t *err) {
  if (error) *err = owned_of(error);
  cosmos_string_free(name);
  cosmos_string_free(settings);
  free_blocks();
  return !error;
}

// ---- metadata -----------------------------------------------------------------------------------------------------------

static size_t count_offers(const cosmos_offer *offers) {
  size_t len = 0;
  while (offers && offers[len].name) len++;
  return len;
}

void exports_cosmos_plugin_metadata_describe(exports_cosmos_plugin_metadata_description_t *ret) {
  const cosmos_description *own = &cosmos_plugin;
  memset(ret, 0, sizeof *ret);
  ret->name = owned_of(own->name);
  ret->version = owned_of(own->version);
  ret->summary = owned_of(own->summary);
  ret->settings_schema = owned_of(own->settings_schema);
  ret->datasets.len = count_offers(own->datasets);
  ret->datasets.ptr = owned_bytes(ret->datasets.len * sizeof *ret->datasets.ptr);
  for (size_t i = 0; i < ret->datasets.len; i++) {
    ret->datasets.ptr[i].name = owned_of(own->datasets[i].name);
    ret->datasets.ptr[i].role = (uint8_t)own->datasets[i].role;
  }
  ret->rewards.len = count_offers(own->rewards);
  ret->rewards.ptr = owned_bytes(ret->rewards.len * sizeof *ret->rewards.ptr);
  for (size_t i = 0; i < ret->rewards.len; i++) {
    ret->rewards.ptr[i].name = owned_of(own->rewards[i].name);
    ret->rewards.ptr[i].role = (uint8_t)own->rewards[i].role;
  }
  ret->environments.len = count_offers(own->environments);
  ret->environments.ptr = owned_bytes(ret->environments.len * sizeof *ret->environments.ptr);
  for (size_t i = 0; i < ret->environments.len; i++) ret->environments.ptr[i].name = owned_of(own->environments[i].name);
  while (own->wants && own->wants[ret->wants.len]) ret->wants.len++;
  ret->wants.ptr = owned_bytes(ret->wants.len * sizeof *ret->wants.ptr);
  for (size_t i = 0; i < ret->wants.len; i++) ret->wants.ptr[i] = owned_of(own->wants[i]);
}

// ---- reward -------------------------------------------------------------------------------------------------------------

#ifdef COSMOS_EXPORT_REWARD

bool exports_cosmos_plugin_reward_init(cosmos_string_t *name, cosmos_string_t *settings, cosmos_string_t *err) {
  return answered(cosmos_reward_init(lent(*name), lent(*settings)), name, settings, err);
}

void exports_cosmos_plugin_reward_score_batch(exports_cosmos_plugin_reward_list_sample_t *samples,
                                              exports_cosmos_plugin_reward_list_result_score_sample_error_t *ret) {
  ret->len = samples->len;
  ret->ptr = owned_bytes(ret->len * sizeof *ret->ptr);
  for (size_t i = 0; i < samples->len; i++) {
    const exports_cosmos_plugin_reward_sample_t *given = &samples->ptr[i];
    cosmos_sample sample = {lent(given->prompt), lent(given->completion), lent(given->reference),
                            metadata_of(given->metadata.ptr, given->metadata.len)};
    cosmos_score score = {0};
    const char *error = cosmos_reward_score(&sample, &score);
    ret->ptr[i].is_err = error != NULL;
    if (error) {
      ret->ptr[i].val.err.message = owned_of(error);
      free_metrics(score.metrics);
    } else {
      ret->ptr[i].val.ok.value = score.value;
      ret->ptr[i].val.ok.metrics.ptr = score.metrics.items;
      ret->ptr[i].val.ok.metrics.len = score.metrics.len;
    }
    free_blocks();
  }
  exports_cosmos_plugin_reward_list_sample_free(samples);
}

#endif

// ---- dataset ------------------------------------------------------------------------------------------------------------

#ifdef COSMOS_EXPORT_DATASET

struct cosmos_example {
  exports_cosmos_plugin_dataset_example_t made;
  bool has_prompt;
};

bool exports_cosmos_plugin_dataset_init(cosmos_string_t *name, cosmos_string_t *settings, cosmos_string_t *err) {
  return answered(cosmos_dataset_init(lent(*name), lent(*settings)), name, settings, err);
}

bool exports_cosmos_plugin_dataset_len(uint64_t *ret, cosmos_string_t *err) {
  const char *error = cosmos_dataset_len(ret);
  if (error) *err = owned_of(error);
  free_blocks();
  return !error;
}

static const char *get(uint64_t index, cosmos_example *example) {
  uint64_t len = 0;
  const char *error = cosmos_dataset_len(&len);
  if (error) return error;
  if (index >= len) return cosmos_format("index %llu is outside the dataset of %llu examples", (unsigned long long)index, (unsigned long long)len);
  error = cosmos_dataset_get(index, example);
  return error || example->has_prompt ? error : "the plugin gave this example no prompt";
}

void exports_cosmos_plugin_dataset_get_batch(cosmos_list_u64_t *indices,
                                             exports_cosmos_plugin_dataset_list_result_example_sample_error_t *ret) {
  ret->len = indices->len;
  ret->ptr = owned_bytes(ret->len * sizeof *ret->ptr);
  for (size_t i = 0; i < indices->len; i++) {
    cosmos_example example;
    memset(&example, 0, sizeof example);
    const char *error = get(indices->ptr[i], &example);
    ret->ptr[i].is_err = error != NULL;
    if (error) {
      exports_cosmos_plugin_dataset_example_free(&example.made);
      ret->ptr[i].val.err.message = owned_of(error);
    } else {
      ret->ptr[i].val.ok = example.made;
    }
    free_blocks();
  }
  cosmos_list_u64_free(indices);
}

void cosmos_example_prompt(cosmos_example *example, cosmos_text prompt) {
  cosmos_plugin_types_prompt_free(&example->made.prompt);
  example->made.prompt.tag = COSMOS_PLUGIN_TYPES_PROMPT_TEXT;
  example->made.prompt.val.text = owned(prompt);
  example->has_prompt = true;
}

void cosmos_example_message(cosmos_example *example, const char *role, cosmos_text content) {
  cosmos_plugin_types_prompt_t *prompt = &example->made.prompt;
  if (prompt->tag != COSMOS_PLUGIN_TYPES_PROMPT_MESSAGES) {
    cosmos_plugin_types_prompt_free(prompt);
    memset(prompt, 0, sizeof *prompt);
    prompt->tag = COSMOS_PLUGIN_TYPES_PROMPT_MESSAGES;
  }
  cosmos_plugin_types_list_message_t *list = &prompt->val.messages;
  list->ptr = grown(list->ptr, list->len, sizeof *list->ptr);
  list->ptr[list->len++] = (cosmos_plugin_types_message_t){owned_of(role), owned(content)};
  example->has_prompt = true;
}

static void set_option(cosmos_option_string_t *option, cosmos_text text) {
  cosmos_option_string_free(option);
  *option = (cosmos_option_string_t){true, owned(text)};
}

void cosmos_example_reference_json(cosmos_example *example, cosmos_text json) {
  set_option(&example->made.reference, json);
}

void cosmos_example_reference_text(cosmos_example *example, cosmos_text text) {
  // At worst every byte becomes \u00XX.
  if (text.len > PTRDIFF_MAX / 6 - 2) abort();
  char *made = cosmos_alloc(6 * text.len + 2), *to = made;
  *to++ = '"';
  for (size_t i = 0; i < text.len; i++) {
    unsigned char c = (unsigned char)text.data[i];
    if (c < 0x20) {
      to += snprintf(to, 7, "\\u%04x", c);
      continue;
    }
    if (c == '"' || c == '\\') *to++ = '\\';
    *to++ = (char)c;
  }
  *to++ = '"';
  set_option(&example->made.reference, (cosmos_text){made, (size_t)(to - made)});
}

void cosmos_example_response(cosmos_example *example, cosmos_text response) {
  set_option(&example->made.response, response);
}

void cosmos_example_meta(cosmos_example *example, const char *key, cosmos_text value) {
  exports_cosmos_plugin_dataset_list_string_pair_t *list = &example->made.metadata;
  list->ptr = grown(list->ptr, list->len, sizeof *list->ptr);
  list->ptr[list->len++] = (cosmos_plugin_types_string_pair_t){owned_of(key), owned(value)};
}

#endif

// ---- environment --------------------------------------------------------------------------------------------------------

#ifdef COSMOS_EXPORT_ENVIRONMENT

bool exports_cosmos_plugin_environment_init(cosmos_string_t *name, cosmos_string_t *settings, cosmos_string_t *err) {
  return answered(cosmos_environment_init(lent(*name), lent(*settings)), name, settings, err);
}

void cosmos_say(cosmos_answer *answer, cosmos_text role, cosmos_text content) {
  cosmos_plugin_types_message_t *items = grown(answer->messages, answer->message_count, sizeof *items);
  items[answer->message_count++] = (cosmos_plugin_types_message_t){owned(role), owned(content)};
  answer->messages = items;
}

static void free_answer(cosmos_answer *answer) {
  cosmos_plugin_types_message_t *items = answer->messages;
  for (size_t i = 0; i < answer->message_count; i++) cosmos_plugin_types_message_free(&items[i]);
  free(items);
  free_metrics(answer->metrics);
}

static cosmos_list_u8_t owned_state(cosmos_text state) {
  cosmos_string_t made = owned(state);
  return (cosmos_list_u8_t){made.ptr, made.len};
}

void exports_cosmos_plugin_environment_reset_batch(
    exports_cosmos_plugin_environment_list_start_t *starts,
    exports_cosmos_plugin_environment_list_result_opened_sample_error_t *ret) {
  ret->len = starts->len;
  ret->ptr = owned_bytes(ret->len * sizeof *ret->ptr);
  for (size_t i = 0; i < starts->len; i++) {
    const exports_cosmos_plugin_environment_start_t *given = &starts->ptr[i];
    cosmos_message *messages = cosmos_alloc(given->messages.len * sizeof *messages);
    for (size_t m = 0; m < given->messages.len; m++)
      messages[m] = (cosmos_message){lent(given->messages.ptr[m].role), lent(given->messages.ptr[m].content)};
    cosmos_start start = {{messages, given->messages.len}, lent(given->reference),
                          metadata_of(given->metadata.ptr, given->metadata.len)};
    cosmos_answer answer = {.tools = {"", 0}, .state = {"", 0}};
    const char *error = cosmos_environment_reset(&start, &answer);
    ret->ptr[i].is_err = error != NULL;
    if (error) {
      ret->ptr[i].val.err.message = owned_of(error);
      free_answer(&answer);
    } else {
      exports_cosmos_plugin_environment_opened_t *opened = &ret->ptr[i].val.ok;
      opened->messages.ptr = answer.messages;
      opened->messages.len = answer.message_count;
      opened->tools = owned(answer.tools);
      opened->state = owned_state(answer.state);
      free_metrics(answer.metrics);
    }
    free_blocks();
  }
  exports_cosmos_plugin_environment_list_start_free(starts);
}

void exports_cosmos_plugin_environment_step_batch(
    exports_cosmos_plugin_environment_list_action_t *actions,
    exports_cosmos_plugin_environment_list_result_outcome_sample_error_t *ret) {
  ret->len = actions->len;
  ret->ptr = owned_bytes(ret->len * sizeof *ret->ptr);
  for (size_t i = 0; i < actions->len; i++) {
    const exports_cosmos_plugin_environment_action_t *given = &actions->ptr[i];
    cosmos_text state = {given->state.len ? (const char *)given->state.ptr : "", given->state.len};
    cosmos_action action = {state, lent(given->completion), given->turn, given->complete};
    cosmos_answer answer = {.tools = {"", 0}, .state = {"", 0}};
    const char *error = cosmos_environment_step(&action, &answer);
    ret->ptr[i].is_err = error != NULL;
    if (error) {
      ret->ptr[i].val.err.message = owned_of(error);
      free_answer(&answer);
    } else {
      exports_cosmos_plugin_environment_outcome_t *outcome = &ret->ptr[i].val.ok;
      outcome->messages.ptr = answer.messages;
      outcome->messages.len = answer.message_count;
      outcome->state = owned_state(answer.state);
      outcome->done = answer.done;
      outcome->reward = answer.reward;
      outcome->metrics.ptr = answer.metrics.items;
      outcome->metrics.len = answer.metrics.len;
    }
    free_blocks();
  }
  exports_cosmos_plugin_environment_list_action_free(actions);
}

#endif

// ---- host imports -------------------------------------------------------------------------------------------------------

// The generated functions only read what they are given.
static cosmos_string_t shown(cosmos_text text) { return (cosmos_string_t){(uint8_t *)text.data, text.len}; }

// An error of the host, in memory of the present call.
static const char *told(cosmos_string_t err) {
  const char *text = cosmos_format("%.*s", (int)err.len, (const char *)err.ptr);
  cosmos_string_free(&err);
  return text;
}

// A text of the host, in memory of the present call.
static cosmos_text taken(cosmos_string_t text) {
  char *copy = cosmos_alloc(text.len);
  if (text.len) memcpy(copy, text.ptr, text.len);
  cosmos_string_free(&text);
  return (cosmos_text){copy, text.len};
}

void cosmos_log(cosmos_level level, const char *format, ...) {
  va_list list;
  va_start(list, format);
  cosmos_string_t message = shown(cosmos_text_of(format_list(format, list)));
  va_end(list);
  cosmos_plugin_log_write((cosmos_plugin_log_level_t)level, &message);
}

const char *cosmos_table_open(const char *name, const char *subset, const char *revision, const char *const *splits,
                              cosmos_table *table) {
  cosmos_list_string_t list = {0};
  while (splits && splits[list.len]) list.len++;
  list.ptr = cosmos_alloc(list.len * sizeof *list.ptr);
  for (size_t i = 0; i < list.len; i++) list.ptr[i] = shown(cosmos_text_of(splits[i]));
  cosmos_plugin_table_source_t source = {shown(cosmos_text_of(name)), shown(cosmos_text_of(subset)),
                                         shown(cosmos_text_of(revision)), list};
  cosmos_plugin_table_own_rows_t rows;
  cosmos_string_t err;
  if (!cosmos_plugin_table_open(&source, &rows, &err)) return told(err);
  table->handle = rows.__handle;
  return NULL;
}

uint64_t cosmos_table_len(cosmos_table table) {
  return cosmos_plugin_table_method_rows_len((cosmos_plugin_table_borrow_rows_t){table.handle});
}

const char *cosmos_table_read(cosmos_table table, uint64_t start, uint32_t *count, cosmos_text *rows) {
  cosmos_list_string_t all = {0}, read;
  cosmos_string_t err;
  uint32_t room = *count;
  *count = 0;
  if (!cosmos_plugin_table_method_rows_read((cosmos_plugin_table_borrow_rows_t){table.handle}, start, room, &all, &read, &err))
    return told(err);
  for (size_t i = 0; i < read.len; i++) {
    cosmos_text row = taken(read.ptr[i]);
    if (*count < room) rows[(*count)++] = row;
  }
  free(read.ptr);
  return NULL;
}

const char *cosmos_render(cosmos_messages messages, bool add_generation_prompt, const char *options, cosmos_text *text) {
  cosmos_plugin_chat_template_list_message_t list = {0};
  list.len = messages.len;
  list.ptr = cosmos_alloc(list.len * sizeof *list.ptr);
  for (size_t i = 0; i < list.len; i++) {
    list.ptr[i].role = shown(messages.items[i].role);
    list.ptr[i].content = shown(messages.items[i].content);
  }
  cosmos_string_t given = shown(cosmos_text_of(options ? options : "{}")), ret, err;
  if (!cosmos_plugin_chat_template_render(&list, add_generation_prompt, &given, &ret, &err)) return told(err);
  *text = taken(ret);
  return NULL;
}
