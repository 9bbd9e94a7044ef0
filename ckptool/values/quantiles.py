"""The normal distribution by IEEE operations alone: quantiles of arrays, probabilities of numbers.

Every machine gets the same bits: +, -, *, / and sqrt are defined to the last one, and so are decimals. A C library's
log and erf, and numpy's SIMD loops for them, are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# AS 241, PPND16: numerator and denominator in three ranges, highest power first.
_MIDDLE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def quantiles(centred: Floats, least: Floats, out: Floats) -> None:
    """Fills ``out`` with the standard normal's quantiles of probabilities p, given as p - 1/2 and min(p, 1 - p).

    Overwrites ``least``. Exact to about 16 digits for ``least`` down to 1e-300.
    """
    import numpy as np

    tails = np.flatnonzero(least < 0.075)
    small = least[tails]
    square = np.multiply(centred, centred, out=least)
    np.subtract(0.180625, square, out=square)
    _ratio(_MIDDLE, square, out)
    out *= centred
    if not len(tails):
        return
    depth = logarithm(small)
    np.negative(depth, out=depth)
    np.sqrt(depth, out=depth)
    far = np.flatnonzero(depth > 5.0)
    made = np.empty_like(depth)
    _ratio(_TAIL, depth - 1.6, made)
    if len(far):  # p below 1.4e-11
        beyond = np.empty(len(far))
        _ratio(_FAR, depth[far] - 5.0, beyond)
        made[far] = beyond
    out[tails] = np.copysign(made, centred[tails])


def _ratio(pair: tuple[tuple[float, ...], tuple[float, ...]], x: Floats, out: Floats) -> None:
    """Fills ``out`` with the quotient of two polynomials."""
    import numpy as np

    below = np.empty_like(x)
    for coefficients, total in ((pair[0], out), (pair[1], below)):
        np.multiply(x, coefficients[0], out=total)
        for coefficient in coefficients[1:-1]:
            total += coefficient
            total *= x
        total += coefficients[-1]
    out /= below


def logarithm(x: Floats) -> Floats:
    """Returns natural logarithms of normal positive numbers, within 1 ulp, by IEEE operations alone.

    The method is that of fdlibm's ``e_log.c``: x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and with
    s = f / (2 + f) the series of log((1 + s) / (1 - s)) cut to seven terms (coefficients by Remez).
    """
    import numpy as np

    bits = x.view(np.int64)
    shifted = bits - 0x3FE6A09E00000000
    power = (shifted >> 52).astype(np.float64)
    shifted &= -(1 << 52)
    f = (bits - shifted).view(np.float64)
    f -= 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    even = ((w * 1.531383769920937332e-01 + 2.222219843214978396e-01) * w + 3.999999999940941908e-01) * w
    odd = (w * 1.479819860511658591e-01 + 1.818357216161805012e-01) * w + 2.857142874366239149e-01
    odd = (odd * w + 6.666666666666735130e-01) * z
    half = f * f * 0.5
    rest = (half + (odd + even)) * s + power * 1.90821492927058770002e-10
    made: Floats = power * 6.93147180369123816490e-01 - ((half - rest) - f)
    return made


def probability(x: float) -> float:
    """Returns the standard normal's distribution function at x, correctly rounded but for the rarest of cases.

    In decimals, whose every operation is defined, since erf of a C library differs between machines.
    """
    from decimal import Context, Decimal, localcontext

    if abs(x) > 38.5:
        return 0.0 if x < 0 else 1.0
    with localcontext(Context(prec=60 + int(x * x / 4))) as context:  # far out most digits cancel
        size = Decimal(abs(x))
        term = total = size  # x + x³/3 + x⁵/(3·5) + ... times the density is what lies between 0 and x
        odd, least = 1, Decimal(10) ** -context.prec
        while term > total * least:
            odd += 2
            term = term * size * size / odd
            total += term
        inner = total * (-size * size / 2).exp() / (2 * _pi(context.prec)).sqrt()
        return float(Decimal("0.5") + (inner if x > 0 else -inner))


def _pi(digits: int) -> Decimal:
    """Returns pi: 16 arctan(1/5) - 4 arctan(1/239), in whole numbers."""
    from decimal import Decimal

    scale: int = 10 ** (digits + 5)

    def arctan(inverse: int) -> int:
        power = total = scale // inverse
        odd, sign = 1, 1
        while power:
            power //= inverse * inverse
            odd, sign = odd + 2, -sign
            total += sign * (power // odd)
        return total

    return Decimal(16 * arctan(5) - 4 * arctan(239)) / Decimal(scale)
