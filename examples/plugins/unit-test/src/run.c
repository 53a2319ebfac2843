// Runs programs: a walk over the tree that counts its steps and its depth, and stops at what has no value.

#include "language.h"

typedef struct {
  const program *program;
  int steps;
  int depth;
  run_end end;
} machine;

static int64_t value_of(machine *m, int at, int64_t *variables);

static int64_t stop(machine *m, run_end why) {
  if (m->end == RAN) m->end = why;
  return 0;
}

static int64_t call(machine *m, const node *n, int64_t *variables) {
  const function *called = &m->program->functions[n->value];
  int64_t own[VARIABLES_MAX] = {0};
  int count = 0;
  for (int argument = n->a; argument >= 0; argument = m->program->nodes[argument].b)
    own[count++] = value_of(m, m->program->nodes[argument].a, variables);
  return m->end == RAN ? value_of(m, called->body, own) : 0;
}

static int64_t arithmetic(machine *m, const node *n, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (n->kind) {
  case ADD: return __builtin_add_overflow(a, b, &result) ? stop(m, OVERFLOWED) : result;
  case SUBTRACT: return __builtin_sub_overflow(a, b, &result) ? stop(m, OVERFLOWED) : result;
  case MULTIPLY: return __builtin_mul_overflow(a, b, &result) ? stop(m, OVERFLOWED) : result;
  case DIVIDE:
  case REMAINDER:
    if (b == 0) return stop(m, DIVIDED_BY_ZERO);
    if (a == INT64_MIN && b == -1) return stop(m, OVERFLOWED);
    return n->kind == DIVIDE ? a / b : a % b;
  case EQUAL: return a == b;
  case UNEQUAL: return a != b;
  case LESS: return a < b;
  default: return a <= b;
  }
}

static int64_t walk(machine *m, const node *n, int64_t *variables) {
  switch (n->kind) {
  case NUMBER: return n->value;
  case VARIABLE: return variables[n->value];
  case LET: variables[n->value] = value_of(m, n->a, variables); return value_of(m, n->b, variables);
  case IF: return value_of(m, value_of(m, n->a, variables) ? n->b : n->c, variables);
  case OR: return value_of(m, n->a, variables) || value_of(m, n->b, variables);
  case AND: return value_of(m, n->a, variables) && value_of(m, n->b, variables);
  case NOT: return !value_of(m, n->a, variables);
  case NEGATE: {
    int64_t a = value_of(m, n->a, variables);
    return a == INT64_MIN ? stop(m, OVERFLOWED) : -a;
  }
  case CALL: return call(m, n, variables);
  default: {
    // In this order, so that what fails first does not depend on the compiler.
    int64_t a = value_of(m, n->a, variables), b = value_of(m, n->b, variables);
    return arithmetic(m, n, a, b);
  }
  }
}

static int64_t value_of(machine *m, int at, int64_t *variables) {
  if (m->end != RAN) return 0;
  if (++m->steps > STEPS_MAX) return stop(m, TOO_MANY_STEPS);
  if (++m->depth > DEPTH_MAX) return stop(m, TOO_DEEP);
  int64_t value = walk(m, &m->program->nodes[at], variables);
  m->depth--;
  return value;
}

run_end run(const program *program, int function, const int64_t *arguments, int64_t *result) {
  machine m = {.program = program, .end = RAN};
  int64_t variables[VARIABLES_MAX] = {0};
  for (int i = 0; i < program->functions[function].parameters; i++) variables[i] = arguments[i];
  *result = value_of(&m, program->functions[function].body, variables);
  return m.end;
}
