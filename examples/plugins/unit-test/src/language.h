// The language of the programs that are tested; README.md describes it.
#ifndef LANGUAGE_H
#define LANGUAGE_H

#include "cosmos_plugin.h"

enum {
  SOURCE_BYTES_MAX = 16 * 1024,
  NODES_MAX = 4096,
  FUNCTIONS_MAX = 32,
  PARAMETERS_MAX = 8,
  VARIABLES_MAX = 32, // parameters and `let`s of one function
  NESTING_MAX = 100,  // of expressions in the source
  STEPS_MAX = 100000, // of one test
  DEPTH_MAX = 1000,   // of expressions and calls that are under way
};

typedef enum {
  NUMBER, // value
  VARIABLE, // value: its slot
  LET, // value: its slot; a: what it is; b: where it holds
  IF, // a: condition; b: then; c: else
  OR, AND, NOT,
  EQUAL, UNEQUAL, LESS, AT_MOST,
  ADD, SUBTRACT, MULTIPLY, DIVIDE, REMAINDER, NEGATE,
  CALL, // value: the function; a: its first argument
  ARGUMENT, // a: the expression; b: the next argument, or -1
} node_kind;

typedef struct {
  node_kind kind;
  int a, b, c; // nodes, or -1
  int64_t value;
} node;

typedef struct {
  cosmos_text name;
  int parameters;
  int variables;
  int body; // -1: called, but not yet defined
} function;

typedef struct {
  node nodes[NODES_MAX];
  int node_count;
  function functions[FUNCTIONS_MAX];
  int function_count;
} program;

// Reads `source`; returns NULL, or what is wrong with it.
const char *parse(cosmos_text source, program *made);

// The function of that name, or -1.
int find_function(const program *program, cosmos_text name);

typedef enum { RAN, OVERFLOWED, DIVIDED_BY_ZERO, TOO_MANY_STEPS, TOO_DEEP } run_end;

// Calls `function` with as many arguments as it has parameters.
run_end run(const program *program, int function, const int64_t *arguments, int64_t *result);

#endif
