#!/usr/bin/env python3
"""Pairs of mathematical answers whose equality sympy decides, as cases for the grader.

    pip install sympy
    tests/python/math_pairs.py 2400 > pairs.jsonl
    cosmos-host plugin test plugins/dist/deepmath.wasm --reward math --cases pairs.jsonl

Each kind gives as many equal pairs (the same value, written otherwise) as unequal ones (a value that sympy shows to be
another). The id of a case starts with its kind. The same count gives the same pairs.
"""
import json
import random
import sys

import sympy as sp
from sympy import Rational as R

x, y, a, b, n, t = sp.symbols("x y a b n t")
rng = random.Random(20261122)


def integer(limit=9, zero=False):
    value = rng.randint(-limit, limit)
    return value if value or zero else integer(limit)


def tex(e, **options):
    return sp.latex(e, **options)


def polynomial(v=x, degree=2):
    return sum(integer(zero=True) * v**k for k in range(degree)) + integer() * v**degree


def differ(e, f):
    """Whether the two have different values at a random point, to 30 digits."""
    symbols = sorted((e.free_symbols | f.free_symbols), key=str)
    points = {s: R(rng.randint(3, 40), 7) for s in symbols}
    return abs(sp.N((e - f).subs(points), 30)) > sp.Float("1e-3") * (1 + abs(sp.N(e.subs(points), 30)))


def changed(e):
    """Something near `e` that is not `e`."""
    for _ in range(50):
        f = rng.choice([e + integer(3), e * rng.choice([2, R(1, 2), -1]), e + rng.choice([x, y, a]), e**2])
        if differ(e, f):
            return f
    raise ValueError(e)


def expand():
    e = polynomial(x, 1) * polynomial(rng.choice([x, y]), 2) + integer()
    return e, sp.expand(e)


def factor():
    e = sp.expand(polynomial(x, 1) * polynomial(x, 1) * rng.choice([1, x, polynomial(x, 1)]))
    return e, sp.factor(e)


def rational():
    e = integer() / polynomial(x, 1) + polynomial(x, 1) / polynomial(x, 2)
    return e, rng.choice([sp.together, sp.apart, sp.cancel])(e)


def simplify():
    e = (x**2 - integer() ** 2) / (x + abs(integer())) + sp.sqrt(abs(integer()) * R(1, 2)) * x
    return e, sp.simplify(e)


def trigonometry():
    e = rng.choice([
        sp.sin(x + y), sp.cos(2 * x), sp.sin(2 * x), sp.cos(x - y), sp.tan(x) ** 2 + 1, sp.sin(x) ** 2 - sp.cos(x) ** 2,
        sp.sin(3 * x), sp.cos(x) ** 4 - sp.sin(x) ** 4,
    ]) * integer() + integer()
    return e, rng.choice([sp.expand_trig, sp.trigsimp, lambda f: sp.expand_trig(f).expand()])(e)


def powers():
    k = rng.randint(1, 5)
    e = rng.choice([
        sp.exp(x) * sp.exp(k), 2**x * 2**k, x**R(k, 2) * x, (x**2 * y) ** k, sp.exp(2 * x) - 1, sp.exp(-x) * k, 4**x,
    ])
    return e, sp.powsimp(sp.expand(e)) if rng.random() < 0.5 else sp.expand(e, force=True)


def logarithms():
    p, q = rng.sample([2, 3, 5, 6, 7, 10, 12], 2)
    e = rng.choice([sp.log(p) + sp.log(q), sp.log(p * q) * integer(), sp.log(R(p, q)), 2 * sp.log(p) - sp.log(q)])
    return e, sp.expand_log(e, force=True) if rng.random() < 0.5 else sp.logcombine(e, force=True)


def roots():
    p, q = rng.randint(2, 12), rng.randint(2, 12)
    e = rng.choice([1 / (sp.sqrt(p) + 1), sp.sqrt(p * 4) + sp.sqrt(q), (sp.sqrt(p) + sp.sqrt(q)) ** 2,
                    p / sp.sqrt(q), sp.cbrt(8 * p), sp.root(p, 4) ** 2, (1 + sp.sqrt(p)) / (2 - sp.sqrt(q + 5))])
    return e, rng.choice([sp.radsimp, sp.expand, sp.nsimplify])(e)


def several(make, label):
    """Pairs of expressions in LaTeX, by one maker."""
    def pair(equal):
        e, f = make()
        if not equal:
            f = changed(f)
        elif differ(sp.sympify(e), sp.sympify(f)):
            raise ValueError(f"{label}: {e} is not {f}")
        return tex(e), tex(f)
    return pair


def close_decimal(value, digits=6):
    return f"{float(value):.{digits}f}".rstrip("0").rstrip(".")


def decimals(equal):
    value = R(rng.randint(-500, 500), rng.choice([3, 4, 7, 8, 9, 11, 16, 40])) or R(1, 3)
    shown = value if equal else value * rng.choice([R(11, 10), R(9, 10), -1]) + rng.choice([0, 1])
    if not equal and abs(shown - value) < R(1, 1000) * abs(value):
        return decimals(equal)
    return tex(value), close_decimal(shown)


def decimal_roots(equal):
    value = rng.choice([sp.sqrt(rng.randint(2, 99)), sp.pi * integer(), sp.sqrt(rng.randint(2, 30)) / rng.randint(2, 9),
                        sp.pi / rng.randint(2, 9), sp.exp(rng.randint(1, 3)), 1 + sp.sqrt(rng.randint(2, 8))])
    if value.is_rational:
        return decimal_roots(equal)
    return tex(value), close_decimal(value if equal else value * R(103, 100))


def fractions(equal):
    p, q, k = integer(50), rng.randint(2, 30), rng.randint(2, 9)
    other = f"\\frac{{{p * k}}}{{{q * k}}}" if equal else f"\\frac{{{p * k + 1}}}{{{q * k}}}"
    return rng.choice([f"\\frac{{{p}}}{{{q}}}", f"\\dfrac{{{p}}}{{{q}}}", f"{p}/{q}"]), other


def percent(equal):
    p = rng.randint(1, 400)
    return f"{p}\\%", rng.choice([f"{p / 100:g}", f"\\frac{{{p}}}{{100}}", f"{p}\\%", f"{p}%"]) if equal else f"{p + 7}\\%"


def degrees(equal):
    d = rng.randint(1, 359)
    return rng.choice([f"{d}^\\circ", f"{d}^{{\\circ}}"]), f"{d}" if equal else f"{d + 1}^\\circ"


def units(equal):
    v = rng.choice([rng.randint(2, 900), rng.randint(20, 999) / 10])
    unit = rng.choice(["cm", "m/s", "kg", "dollars", "square meters", "km"])
    return f"{v:g}\\text{{ {unit}}}", rng.choice([f"{v:g}", f"{v:g} \\text{{{unit}}}", f"{v:g} \\, \\text{{{unit}}}"]) if equal \
        else f"{v + 3:g}\\text{{ {unit}}}"


def members(equal, count=None):
    values = [rng.choice([R(integer(20), rng.randint(1, 6)), sp.sqrt(rng.randint(2, 20)), sp.Integer(integer(30))])
              for _ in range(count or rng.randint(2, 4))]
    others = list(values)
    if not equal:
        others[rng.randrange(len(others))] += integer(3)
    return values, others


def rewritten(value):
    """The same number as text, in one of its forms."""
    if value.is_Rational and not value.is_Integer:
        return rng.choice([tex(value), f"{value.p}/{value.q}", f"\\dfrac{{{value.p}}}{{{value.q}}}"])
    return tex(value)


def tuples(equal):
    values, others = members(equal)
    return "(" + ", ".join(map(rewritten, values)) + ")", "(" + ",".join(map(rewritten, others)) + ")"


def sets(equal):
    values, others = members(equal)
    values, others = list(dict.fromkeys(values)), list(dict.fromkeys(others))
    rng.shuffle(others)
    return "\\{" + ", ".join(map(rewritten, values)) + "\\}", "\\{" + ", ".join(map(rewritten, others)) + "\\}"


def intervals(equal):
    low, high = sorted(rng.sample(range(-20, 20), 2))
    left, right = rng.choice("[("), rng.choice("])")
    other = rng.choice([f"{left}{low},{high}{right}", f"{left} {low}, {high} {right}", f"\\left{left}{low}, {high}\\right{right}"])
    if not equal:
        other = f"{left}{low}, {high + 1}{right}"
    return f"{left}{low}, {high}{right}", other


def unions(equal):
    p, q, r, s = sorted(rng.sample(range(-20, 20), 4))
    other = f"({p},{q})\\cup({r},{s})" if equal else f"({p},{q})\\cup({r},{s + 1})"
    return f"({p}, {q}) \\cup ({r}, {s})", other


def matrices(equal):
    values, others = members(equal, 4)
    kind = rng.choice(["pmatrix", "bmatrix"])
    def shape(v, k):
        cells = list(map(rewritten, v))
        return f"\\begin{{{k}}} {cells[0]} & {cells[1]} \\\\ {cells[2]} & {cells[3]} \\end{{{k}}}"
    return shape(values, kind), shape(others, kind)


def equations(equal):
    e, f = polynomial(x, 1), polynomial(y, 1)
    move = integer() * x + integer()
    left, right = sp.expand(e + move), sp.expand(f + move)
    if not equal:
        right = right + integer(4)
    return f"{tex(e)} = {tex(f)}", f"{tex(left)} = {tex(right)}"


def assigned(equal):
    value = rng.choice([R(integer(40), rng.randint(2, 9)), sp.Integer(integer(40)), sp.sqrt(rng.randint(2, 30))])
    name = rng.choice("xyzkn")
    return f"{name} = {rewritten(value)}", rewritten(value if equal else value + 1)


def large(equal):
    value = rng.randint(10_000, 99_999_999)
    grouped = rng.choice([f"{value:,}", f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", ",\\!"), f"{value}"])
    return grouped, str(value if equal else value + max(value // 50, 3))


def scientific(equal):
    m, e = rng.randint(11, 99), rng.randint(2, 12)
    value = m * 10 ** (e - 1)
    return f"{m / 10} \\times 10^{{{e}}}", str(value if equal else value * 3)


def functions(equal):
    k = rng.randint(2, 9)
    e, f = rng.choice([
        (f"{k}!", str(sp.factorial(k))), (f"\\binom{{{k + 3}}}{{{k}}}", str(sp.binomial(k + 3, k))),
        (f"\\log_{{2}} {2**k}", str(k)), (f"\\lfloor {k}.7 \\rfloor", str(k)), (f"\\left|-{k}\\right|", str(k)),
        (f"\\sqrt[3]{{{k**3}}}", str(k)), (f"{k}^{{3}}", str(k**3)), (f"\\sin\\left(\\frac{{\\pi}}{{6}}\\right)+{k}", f"{k}.5"),
        (f"\\frac{{{k}!}}{{2!}}", str(sp.factorial(k) // 2)), (f"\\ln e^{{{k}}}", str(k)),
    ])
    return e, f if equal else str(sp.sympify(f) + 2)


def complex_numbers(equal):
    p, q, r, s = (integer() for _ in range(4))
    e = sp.expand((p + q * sp.I) * (r + s * sp.I))
    f = e if equal else e + rng.choice([1, sp.I, -2])
    def written(z):
        re, im = sp.re(z), sp.im(z)
        return f"{re}{'+' if im >= 0 else '-'}{abs(im)}i"
    return f"({written(p + q * sp.I)})({written(r + s * sp.I)})", written(f)


KINDS = {
    **{f.__name__: several(f, f.__name__)
       for f in [expand, factor, rational, simplify, trigonometry, powers, logarithms, roots]},
    **{f.__name__: f for f in [decimals, decimal_roots, fractions, percent, degrees, units, tuples, sets, intervals, unions,
                               matrices, equations, assigned, large, scientific, functions, complex_numbers]},
}


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2400
    made = 0
    while made < count:
        for kind, make in KINDS.items():
            equal = made // len(KINDS) % 2 == 0
            try:
                answer, reference = make(equal)
            except (ValueError, ZeroDivisionError, TypeError):
                continue
            case = {"id": f"{kind}-{made}", "completion": f"So it is $\\boxed{{{answer}}}$.", "reference": reference,
                    "score": 1.0 if equal else 0.0}
            print(json.dumps(case))
            made += 1
            if made == count:
                break


main()
