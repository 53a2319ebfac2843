// Reads programs: recursive descent, one function a level of precedence.

#include "language.h"

#include <string.h>

typedef struct {
  const char *at;
  const char *end;
  program *program;
  function *function; // whose body is being read
  cosmos_text names[VARIABLES_MAX];
  int in_scope; // of `names`, the innermost last
  int slots[VARIABLES_MAX];
  int nesting;
  const char *error; // the first one
} reader;

static int expression(reader *r);

static int fail(reader *r, const char *error) {
  if (!r->error) r->error = error;
  r->at = r->end;
  return -1;
}

static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static void skip(reader *r) {
  while (r->at < r->end) {
    if (*r->at == '#') {
      while (r->at < r->end && *r->at != '\n') r->at++;
    } else if (strchr(" \t\r\n", *r->at) && *r->at) {
      r->at++;
    } else {
      return;
    }
  }
}

// Takes `sign` when it comes next. `<` does not take the head of `<=`.
static bool take(reader *r, const char *sign) {
  skip(r);
  size_t len = strlen(sign);
  if ((size_t)(r->end - r->at) < len || memcmp(r->at, sign, len) != 0) return false;
  bool is_longer = len == 1 && strchr("<>=", *sign) && r->end - r->at > 1 && r->at[1] == '=';
  if (is_longer) return false;
  r->at += len;
  return true;
}

static cosmos_text peek_word(reader *r) {
  skip(r);
  const char *end = r->at;
  if (end < r->end && is_letter(*end))
    while (end < r->end && (is_letter(*end) || is_digit(*end))) end++;
  return (cosmos_text){r->at, (size_t)(end - r->at)};
}

static bool take_word(reader *r, const char *word) {
  if (!cosmos_text_is(peek_word(r), word)) return false;
  r->at += strlen(word);
  return true;
}

static bool is_keyword(cosmos_text word) {
  static const char *const keywords[] = {"def", "let", "in", "if", "then", "else", "and", "or", "not"};
  for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
    if (cosmos_text_is(word, keywords[i])) return true;
  return false;
}

static cosmos_text take_name(reader *r) {
  cosmos_text word = peek_word(r);
  if (!word.len || is_keyword(word)) {
    fail(r, "a name is missing");
    return (cosmos_text){"", 0};
  }
  r->at += word.len;
  return word;
}

static bool same(cosmos_text a, cosmos_text b) { return a.len == b.len && memcmp(a.data, b.data, a.len) == 0; }

static int put(reader *r, node made) {
  if (r->error) return -1;
  if (r->program->node_count == NODES_MAX) return fail(r, "the program is too long");
  r->program->nodes[r->program->node_count] = made;
  return r->program->node_count++;
}

// Brings a variable into scope and returns its slot.
static int64_t declare(reader *r, cosmos_text name) {
  if (r->function->variables == VARIABLES_MAX || r->in_scope == VARIABLES_MAX) return fail(r, "too many variables");
  r->names[r->in_scope] = name;
  r->slots[r->in_scope] = r->function->variables++;
  return r->slots[r->in_scope++];
}

int find_function(const program *program, cosmos_text name) {
  for (int i = 0; i < program->function_count; i++)
    if (same(program->functions[i].name, name)) return i;
  return -1;
}

// The function of that name; one that is not yet defined gets its place.
static int function_named(reader *r, cosmos_text name) {
  int found = find_function(r->program, name);
  if (found >= 0) return found;
  if (r->program->function_count == FUNCTIONS_MAX) return fail(r, "too many functions");
  r->program->functions[r->program->function_count] = (function){name, -1, 0, -1};
  return r->program->function_count++;
}

// `(a, b)` after the name of a function.
static int call(reader *r, cosmos_text name) {
  int called = function_named(r, name), first = -1, last = -1, count = 0;
  if (called < 0) return -1;
  while (!take(r, ")")) {
    if (count && !take(r, ",")) return fail(r, "`,` or `)` is missing after an argument");
    int argument = put(r, (node){ARGUMENT, expression(r), -1, -1, 0});
    if (argument < 0) return -1;
    if (last < 0) first = argument;
    else r->program->nodes[last].b = argument;
    last = argument;
    if (++count > PARAMETERS_MAX) return fail(r, "too many arguments");
  }
  // Whether the number is right is seen when all functions are known; `b` keeps it until then.
  return put(r, (node){CALL, first, count, -1, called});
}

static int number(reader *r) {
  int64_t value = 0;
  for (; r->at < r->end && is_digit(*r->at); r->at++)
    if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *r->at - '0', &value))
      return fail(r, "a number is too large");
  return put(r, (node){NUMBER, -1, -1, -1, value});
}

static int atom(reader *r) {
  skip(r);
  if (r->at < r->end && is_digit(*r->at)) return number(r);
  if (take(r, "(")) {
    int inner = expression(r);
    return take(r, ")") ? inner : fail(r, "`)` is missing");
  }
  cosmos_text name = take_name(r);
  if (r->error) return -1;
  if (take(r, "(")) return call(r, name);
  for (int i = r->in_scope; i-- > 0;)
    if (same(r->names[i], name)) return put(r, (node){VARIABLE, -1, -1, -1, r->slots[i]});
  return fail(r, cosmos_format("`%.*s` is not defined", (int)(name.len < 40 ? name.len : 40), name.data));
}

static int unary(reader *r) {
  if (!take(r, "-")) return atom(r);
  if (++r->nesting > NESTING_MAX) return fail(r, "the program nests too deep");
  int made = put(r, (node){NEGATE, unary(r), -1, -1, 0});
  r->nesting--;
  return made;
}

static int product(reader *r) {
  int left = unary(r);
  for (;;) {
    node_kind kind = take(r, "*") ? MULTIPLY : take(r, "/") ? DIVIDE : take(r, "%") ? REMAINDER : NUMBER;
    if (kind == NUMBER || left < 0) return left;
    left = put(r, (node){kind, left, unary(r), -1, 0});
  }
}

static int sum(reader *r) {
  int left = product(r);
  for (;;) {
    node_kind kind = take(r, "+") ? ADD : take(r, "-") ? SUBTRACT : NUMBER;
    if (kind == NUMBER || left < 0) return left;
    left = put(r, (node){kind, left, product(r), -1, 0});
  }
}

static int comparison(reader *r) {
  int left = sum(r);
  if (take(r, "==")) return put(r, (node){EQUAL, left, sum(r), -1, 0});
  if (take(r, "!=")) return put(r, (node){UNEQUAL, left, sum(r), -1, 0});
  if (take(r, "<=")) return put(r, (node){AT_MOST, left, sum(r), -1, 0});
  if (take(r, ">=")) return put(r, (node){AT_MOST, sum(r), left, -1, 0});
  if (take(r, "<")) return put(r, (node){LESS, left, sum(r), -1, 0});
  if (take(r, ">")) return put(r, (node){LESS, sum(r), left, -1, 0});
  return left;
}

static int negation(reader *r) {
  if (!take_word(r, "not")) return comparison(r);
  if (++r->nesting > NESTING_MAX) return fail(r, "the program nests too deep");
  int made = put(r, (node){NOT, negation(r), -1, -1, 0});
  r->nesting--;
  return made;
}

static int conjunction(reader *r) {
  int left = negation(r);
  while (left >= 0 && take_word(r, "and")) left = put(r, (node){AND, left, negation(r), -1, 0});
  return left;
}

static int let(reader *r) {
  cosmos_text name = take_name(r);
  if (!take(r, "=")) return fail(r, "`=` is missing after `let`");
  int value = expression(r);
  if (!take_word(r, "in")) return fail(r, "`in` is missing after `let`");
  int scope = r->in_scope;
  int64_t slot = declare(r, name);
  int body = expression(r);
  r->in_scope = scope;
  return put(r, (node){LET, value, body, -1, slot});
}

static int choice(reader *r) {
  int condition = expression(r);
  if (!take_word(r, "then")) return fail(r, "`then` is missing after `if`");
  int yes = expression(r);
  if (!take_word(r, "else")) return fail(r, "`else` is missing after `then`");
  return put(r, (node){IF, condition, yes, expression(r), 0});
}

static int expression(reader *r) {
  if (++r->nesting > NESTING_MAX) return fail(r, "the program nests too deep");
  int made;
  if (take_word(r, "let")) {
    made = let(r);
  } else if (take_word(r, "if")) {
    made = choice(r);
  } else {
    made = conjunction(r);
    while (made >= 0 && take_word(r, "or")) made = put(r, (node){OR, made, conjunction(r), -1, 0});
  }
  r->nesting--;
  return made;
}

static void definition(reader *r) {
  int index = function_named(r, take_name(r));
  if (index < 0) return;
  r->function = &r->program->functions[index];
  if (r->function->body >= 0) {
    fail(r, "a function is defined twice");
    return;
  }
  r->in_scope = 0;
  int parameters = 0;
  if (!take(r, "(")) fail(r, "`(` is missing after the name of a function");
  while (!r->error && !take(r, ")")) {
    if (parameters && !take(r, ",")) fail(r, "`,` or `)` is missing after a parameter");
    declare(r, take_name(r));
    if (++parameters > PARAMETERS_MAX) fail(r, "too many parameters");
  }
  r->function->parameters = parameters;
  if (!take(r, "=")) fail(r, "`=` is missing before the body of a function");
  r->function->body = expression(r);
}

const char *parse(cosmos_text source, program *made) {
  made->node_count = made->function_count = 0;
  if (source.len > SOURCE_BYTES_MAX) return "the program is too long";
  reader r = {.at = source.data, .end = source.data + source.len, .program = made};
  do {
    if (!take_word(&r, "def")) fail(&r, "`def` is missing");
    else definition(&r);
    skip(&r);
  } while (r.at < r.end);
  for (int i = 0; i < made->node_count && !r.error; i++) {
    node *n = &made->nodes[i];
    if (n->kind != CALL) continue;
    if (made->functions[n->value].body < 0) fail(&r, "a function is called but not defined");
    else if (made->functions[n->value].parameters != n->b) fail(&r, "a function is called with a wrong number of arguments");
  }
  return r.error;
}
