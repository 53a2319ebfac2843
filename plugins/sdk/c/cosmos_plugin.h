// Plugins for cosmos-host in C: what an author includes, over the generated bindings of cosmos:plugin 0.2.
//
// A reward is one description and two functions:
//
//     #include "cosmos_plugin.h"
//
//     static const cosmos_offer rewards[] = {{"brevity", COSMOS_TRAIN}, {0}};
//     const cosmos_description cosmos_plugin = {
//         .name = "brevity", .version = "0.1.0", .summary = "the shorter, the better", .rewards = rewards};
//
//     const char *cosmos_reward_init(cosmos_text name, cosmos_text settings) { return NULL; }
//
//     const char *cosmos_reward_score(const cosmos_sample *sample, cosmos_score *score) {
//       score->value = 1.0 / (1.0 + (double)sample->completion.len);
//       return NULL;
//     }
//
// Which functions there must be follows from `exports` in plugin.toml. One instance has one thread. A call that traps
// (abort, a division by zero, a null function, an endless loop) costs that sample and the instance, never the run.
#ifndef COSMOS_PLUGIN_H
#define COSMOS_PLUGIN_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ---- texts ----------------------------------------------------------------------------------------------------------

// UTF-8 with its length in bytes. No zero byte ends it: a model may write one, and every other byte too.
typedef struct {
  const char *data;
  size_t len;
} cosmos_text;

// Of a text that a zero byte ends.
cosmos_text cosmos_text_of(const char *text);
bool cosmos_text_is(cosmos_text text, const char *other);
// The part from `start`, at most `len` bytes; empty where there is none.
cosmos_text cosmos_text_part(cosmos_text text, size_t start, size_t len);
// Without white space at both ends.
cosmos_text cosmos_text_trim(cosmos_text text);
// Where `needle` first stands, or -1.
ptrdiff_t cosmos_text_find(cosmos_text text, const char *needle);

// Memory for the present call; it is given back when the call returns. Never NULL: without memory the call traps.
void *cosmos_alloc(size_t bytes);
// Like snprintf, into memory of the present call. What the functions below return as an error may be made with it.
__attribute__((format(printf, 1, 2))) const char *cosmos_format(const char *format, ...);

// ---- JSON -----------------------------------------------------------------------------------------------------------

// References and settings are JSON. A value is a place in its text, checked as a whole by cosmos_json_read.
typedef struct {
  const char *at;
  const char *end;
} cosmos_json;

typedef enum {
  COSMOS_JSON_NULL,
  COSMOS_JSON_BOOL,
  COSMOS_JSON_NUMBER,
  COSMOS_JSON_TEXT,
  COSMOS_JSON_LIST,
  COSMOS_JSON_OBJECT,
} cosmos_json_kind;

// False: `text` is no JSON, or nests more than 64 deep.
bool cosmos_json_read(cosmos_text text, cosmos_json *value);
cosmos_json_kind cosmos_json_kind_of(cosmos_json value);
bool cosmos_json_bool(cosmos_json value, bool *answer);
bool cosmos_json_number(cosmos_json value, double *number);
// The text without quotes and escapes, in memory of the present call.
bool cosmos_json_text(cosmos_json value, cosmos_text *text);
// The value of a key of an object.
bool cosmos_json_get(cosmos_json object, const char *key, cosmos_json *value);
// `cosmos_json_get` along a path such as "custom.my-plugin.weight".
bool cosmos_json_path(cosmos_json object, const char *path, cosmos_json *value);
// Goes through a list: start with `*place = NULL`; false after the last item.
bool cosmos_json_next(cosmos_json list, const char **place, cosmos_json *item);
// A reference as text: a JSON string without its quotes, anything else as it stands.
cosmos_text cosmos_reference_text(cosmos_text reference);

// ---- what the plugin is ---------------------------------------------------------------------------------------------

typedef enum { COSMOS_TRAIN, COSMOS_VALIDATION, COSMOS_FILTER } cosmos_role;

// Something offered by name. A list of them ends with {0}.
typedef struct {
  const char *name;
  cosmos_role role; // environments have none
} cosmos_offer;

typedef struct {
  const char *name;
  const char *version;
  const char *summary;
  const cosmos_offer *datasets;     // NULL: none
  const cosmos_offer *rewards;      // NULL: none; only rewards can be filters
  const cosmos_offer *environments; // NULL: none
  const char *settings_schema;      // JSON schema of the settings, or NULL
  const char *const *wants;         // grants it asks for, ended by NULL, or NULL
} cosmos_description;

// The author defines it.
extern const cosmos_description cosmos_plugin;

typedef struct {
  cosmos_text key;
  cosmos_text value;
} cosmos_pair;

typedef struct {
  const cosmos_pair *items;
  size_t len;
} cosmos_metadata;

// The value of a key, or an empty text.
cosmos_text cosmos_meta(cosmos_metadata metadata, const char *key);

// Numbers beside a score. Put them in with cosmos_metric.
typedef struct {
  void *items;
  size_t len;
} cosmos_metrics;

void cosmos_metric(cosmos_metrics *metrics, const char *name, double value);

// All functions below that return `const char *` return NULL, or the text of an error that the user reads.

// ---- reward ---------------------------------------------------------------------------------------------------------

typedef struct {
  cosmos_text prompt;
  cosmos_text completion;
  cosmos_text reference; // JSON, or empty
  cosmos_metadata metadata;
} cosmos_sample;

typedef struct {
  double value;
  cosmos_metrics metrics;
} cosmos_score;

// `name` is one of the offered rewards; `settings` is JSON.
const char *cosmos_reward_init(cosmos_text name, cosmos_text settings);
// An error is for a sample that cannot be scored; a wrong answer is a score.
const char *cosmos_reward_score(const cosmos_sample *sample, cosmos_score *score);

// ---- dataset --------------------------------------------------------------------------------------------------------

typedef struct cosmos_example cosmos_example;

const char *cosmos_dataset_init(cosmos_text name, cosmos_text settings);
const char *cosmos_dataset_len(uint64_t *len);
// `index` is below the length. Every example needs cosmos_example_prompt or at least one cosmos_example_message.
const char *cosmos_dataset_get(uint64_t index, cosmos_example *example);

// The finished prompt.
void cosmos_example_prompt(cosmos_example *example, cosmos_text prompt);
// One more message; the host renders them with the student's chat template.
void cosmos_example_message(cosmos_example *example, const char *role, cosmos_text content);
// What the reward gets back: as JSON, or a text that becomes a JSON string.
void cosmos_example_reference_json(cosmos_example *example, cosmos_text json);
void cosmos_example_reference_text(cosmos_example *example, cosmos_text text);
// The completion to imitate in supervised fine-tuning.
void cosmos_example_response(cosmos_example *example, cosmos_text response);
void cosmos_example_meta(cosmos_example *example, const char *key, cosmos_text value);

// ---- environment ----------------------------------------------------------------------------------------------------

typedef struct {
  cosmos_text role;
  cosmos_text content;
} cosmos_message;

typedef struct {
  const cosmos_message *items;
  size_t len;
} cosmos_messages;

typedef struct {
  cosmos_messages messages; // of the example
  cosmos_text reference;    // JSON, or empty
  cosmos_metadata metadata;
} cosmos_start;

typedef struct {
  cosmos_text state; // as the last step left it; any bytes
  cosmos_text completion;
  uint32_t turn; // messages that the model has said before this one
  bool complete; // false: a limit cut the model off, and no further turn follows
} cosmos_action;

// What reset and step answer with; begin with nothing.
typedef struct {
  cosmos_text tools; // reset only: JSON list of tool definitions, or empty
  cosmos_text state; // comes back with the next step; at most 65,536 bytes
  bool done;         // step only: the conversation is over
  double reward;     // step only: added to the conversation's
  cosmos_metrics metrics;
  void *messages; // put them in with cosmos_say
  size_t message_count;
} cosmos_answer;

// One more message that the model hears.
void cosmos_say(cosmos_answer *answer, cosmos_text role, cosmos_text content);

const char *cosmos_environment_init(cosmos_text name, cosmos_text settings);
const char *cosmos_environment_reset(const cosmos_start *start, cosmos_answer *answer);
const char *cosmos_environment_step(const cosmos_action *action, cosmos_answer *answer);

// ---- host imports: name each that you call under `imports` in plugin.toml ---------------------------------------------

typedef enum { COSMOS_TRACE, COSMOS_DEBUG, COSMOS_INFO, COSMOS_WARN, COSMOS_ERROR } cosmos_level;

// Import "log".
__attribute__((format(printf, 2, 3))) void cosmos_log(cosmos_level level, const char *format, ...);

// Import "table": rows of a Hugging Face dataset (hub id, folder or file).
typedef struct {
  int32_t handle;
} cosmos_table;

// `splits` is ended by NULL. The settings' section `dataset` says which one the run wants.
const char *cosmos_table_open(const char *name, const char *subset, const char *revision, const char *const *splits,
                              cosmos_table *table);
uint64_t cosmos_table_len(cosmos_table table);
// `count` rows from `start`, at most 64, each a JSON object; `rows` has room for them, `*count` says how many came.
const char *cosmos_table_read(cosmos_table table, uint64_t start, uint32_t *count, cosmos_text *rows);

// Import "chat-template": `messages` rendered with the student's template; `options` is a JSON object of its variables.
const char *cosmos_render(cosmos_messages messages, bool add_generation_prompt, const char *options, cosmos_text *text);

#endif
