"""The reward of examples/plugins/unit-test in Python: reads the language of its README.md and runs the tests.

Functions become closures, the quickest way in plain Python to run a tree more than once.
"""

import re

SOURCE_BYTES_MAX, NODES_MAX, NESTING_MAX, STEPS_MAX, DEPTH_MAX = 16 * 1024, 4096, 100, 100_000, 1000
FUNCTIONS_MAX, PARAMETERS_MAX, VARIABLES_MAX, TESTS_MAX = 32, 8, 32, 1000
LOWEST, HIGHEST = -(2**63), 2**63 - 1
TOKEN = re.compile(r"\s*(?:#[^\n]*\s*)*(?:(\d+)|([A-Za-z_][A-Za-z_0-9]*)|(==|!=|<=|>=|[-+*/%()<>=,])|(\S))?")
BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.S)
DEFINITION = re.compile(r"^def ", re.M)
KEYWORDS = {"def", "let", "in", "if", "then", "else", "and", "or", "not"}


class Wrong(Exception):
    """No program, or one that fails."""


class Machine:
    def __init__(self):
        self.steps = self.depth = 0

    def enter(self):
        self.steps += 1
        self.depth += 1
        if self.steps > STEPS_MAX or self.depth > DEPTH_MAX:
            raise Wrong("too many steps")


def bounded(value):
    if LOWEST <= value <= HIGHEST:
        return value
    raise Wrong("overflow")


def quotient(a, b):
    if b == 0:
        raise Wrong("division by zero")
    value = abs(a) // abs(b)
    return bounded(value if (a < 0) == (b < 0) else -value)


def remainder(a, b):
    return a - b * quotient(a, b)


OPERATORS = {
    "+": lambda a, b: bounded(a + b),
    "-": lambda a, b: bounded(a - b),
    "*": lambda a, b: bounded(a * b),
    "/": quotient,
    "%": remainder,
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "<": lambda a, b: int(a < b),
    ">": lambda a, b: int(a > b),
    "<=": lambda a, b: int(a <= b),
    ">=": lambda a, b: int(a >= b),
}


def counted(run):
    def node(machine, variables):
        machine.enter()
        value = run(machine, variables)
        machine.depth -= 1
        return value

    return node


class Reader:
    def __init__(self, source):
        self.tokens = []
        at = 0
        while at < len(source):
            found = TOKEN.match(source, at)
            at = found.end()
            if found.lastindex:
                self.tokens.append((found.lastindex, found.group(found.lastindex)))
        self.at = self.nodes = self.nesting = 0
        self.functions, self.calls = {}, []

    def peek(self):
        return self.tokens[self.at][1] if self.at < len(self.tokens) else None

    def take(self, text):
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def expect(self, text):
        if not self.take(text):
            raise Wrong(f"`{text}` is missing")

    def name(self):
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else (0, "")
        if kind != 2 or text in KEYWORDS:
            raise Wrong("a name is missing")
        self.at += 1
        return text

    def node(self, run):
        self.nodes += 1
        if self.nodes > NODES_MAX:
            raise Wrong("the program is too long")
        return counted(run)

    def deeper(self, parse):
        self.nesting += 1
        if self.nesting > NESTING_MAX:
            raise Wrong("the program nests too deep")
        made = parse()
        self.nesting -= 1
        return made

    def program(self):
        while True:
            self.expect("def")
            name = self.name()
            if name in self.functions:
                raise Wrong("a function is defined twice")
            self.functions[name] = None
            self.scope = []
            self.expect("(")
            while not self.take(")"):
                if self.scope:
                    self.expect(",")
                self.scope.append(self.name())
            parameters = len(self.scope)
            self.variables = parameters
            if parameters > PARAMETERS_MAX:
                raise Wrong("too many parameters")
            self.slots = list(range(parameters))
            self.expect("=")
            self.functions[name] = (parameters, self.expression())
            if self.peek() is None:
                break
        if len(self.functions) > FUNCTIONS_MAX:
            raise Wrong("too many functions")
        for name, count in self.calls:
            if name not in self.functions or self.functions[name][0] != count:
                raise Wrong("a function is called wrongly")
        return self.functions

    def expression(self):
        return self.deeper(self.whole)

    def whole(self):
        if self.take("let"):
            name = self.name()
            self.expect("=")
            value = self.expression()
            self.expect("in")
            slot = self.variables
            self.variables += 1
            if self.variables > VARIABLES_MAX:
                raise Wrong("too many variables")
            self.scope.append(name)
            self.slots.append(slot)
            body = self.expression()
            self.scope.pop()
            self.slots.pop()

            def let(machine, variables):
                variables[slot] = value(machine, variables)
                return body(machine, variables)

            return self.node(let)
        if self.take("if"):
            condition = self.expression()
            self.expect("then")
            yes = self.expression()
            self.expect("else")
            no = self.expression()
            return self.node(lambda m, v: yes(m, v) if condition(m, v) else no(m, v))
        made = self.conjunction()
        while self.take("or"):
            made = self.either(made, self.conjunction())
        return made

    def either(self, a, b):
        return self.node(lambda m, v: int(a(m, v) != 0 or b(m, v) != 0))

    def both(self, a, b):
        return self.node(lambda m, v: int(a(m, v) != 0 and b(m, v) != 0))

    def conjunction(self):
        made = self.negation()
        while self.take("and"):
            made = self.both(made, self.negation())
        return made

    def negation(self):
        if self.take("not"):
            inner = self.deeper(self.negation)
            return self.node(lambda m, v: int(not inner(m, v)))
        left = self.chain(("+", "-"), lambda: self.chain(("*", "/", "%"), self.unary))
        if self.peek() in ("==", "!=", "<", ">", "<=", ">="):
            sign = self.peek()
            self.at += 1
            return self.binary(sign, left, self.chain(("+", "-"), lambda: self.chain(("*", "/", "%"), self.unary)))
        return left

    def chain(self, signs, part):
        left = part()
        while self.peek() in signs:
            sign = self.peek()
            self.at += 1
            left = self.binary(sign, left, part())
        return left

    def binary(self, sign, a, b):
        operator = OPERATORS[sign]
        return self.node(lambda m, v: operator(a(m, v), b(m, v)))

    def unary(self):
        if self.take("-"):
            inner = self.deeper(self.unary)
            return self.node(lambda m, v: bounded(-inner(m, v)))
        return self.atom()

    def atom(self):
        if self.take("("):
            inner = self.expression()
            self.expect(")")
            return inner
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else (0, "")
        if kind == 1:
            self.at += 1
            value = bounded(int(text))
            return self.node(lambda m, v: value)
        name = self.name()
        if self.take("("):
            return self.call(name)
        for known, slot in zip(reversed(self.scope), reversed(self.slots)):
            if known == name:
                return self.node(lambda m, v: v[slot])
        raise Wrong("a name is not defined")

    def call(self, name):
        arguments = []
        while not self.take(")"):
            if arguments:
                self.expect(",")
            arguments.append(self.expression())
        if len(arguments) > PARAMETERS_MAX:
            raise Wrong("too many arguments")
        self.calls.append((name, len(arguments)))
        functions = self.functions

        def run(machine, variables):
            own = [argument(machine, variables) for argument in arguments] + [0] * VARIABLES_MAX
            return functions[name][1](machine, own)

        return self.node(run)


def code_of(completion):
    blocks = BLOCK.findall(completion)
    if blocks:
        return blocks[-1]
    found = DEFINITION.search(completion)
    return completion[found.start() :] if found else None


def passes(functions, name, test):
    if functions is None or name not in functions or functions[name][0] != len(test["in"]):
        return False
    try:
        return functions[name][1](Machine(), list(test["in"]) + [0] * VARIABLES_MAX) == test["out"]
    except Wrong:
        return False


def score(case):
    """The fraction of the tests that the completion's function passes; none where the reference is broken."""
    reference = case["reference"]
    if not isinstance(reference, dict) or not isinstance(reference.get("tests"), list) or not reference["tests"]:
        return None
    source, functions = code_of(case["completion"]), None
    if source is not None and len(source.encode()) <= SOURCE_BYTES_MAX:
        try:
            functions = Reader(source).program()
        except (Wrong, RecursionError):
            functions = None
    tests = reference["tests"]
    return sum(passes(functions, reference["function"], test) for test in tests) / len(tests)
