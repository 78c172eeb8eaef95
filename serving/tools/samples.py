"""Sample tools: the weather of a fixed table, a calculator, a clock."""

import ast
import math
import operator
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from serving.tools.registry import ToolRegistry

WEATHER = {  # city -> degrees Celsius, sky, relative humidity in %
    "beijing": (21, "sunny", 30),
    "shanghai": (24, "cloudy", 68),
    "shenzhen": (29, "thunderstorms", 84),
    "chengdu": (19, "overcast", 77),
    "harbin": (4, "snow", 59),
    "london": (12, "light rain", 81),
    "new york": (16, "windy", 52),
    "singapore": (31, "showers", 88),
}
CITY_NAMES = {
    "北京": "beijing",
    "上海": "shanghai",
    "深圳": "shenzhen",
    "成都": "chengdu",
    "哈尔滨": "harbin",
    "伦敦": "london",
    "纽约": "new york",
    "新加坡": "singapore",
}


def weather(
    city: Annotated[str, "its name, such as Beijing or 北京"],
    unit: Literal["celsius", "fahrenheit"] = "celsius",
) -> dict[str, Any]:
    """The weather of a city today (sample data of a fixed table)."""
    name = city.strip().removesuffix("市").lower()
    name = CITY_NAMES.get(name, name)
    if name not in WEATHER:
        raise ValueError(f"no city {city[:40]!r} in the table; there are {', '.join(WEATHER)}")
    degrees, sky, humidity = WEATHER[name]
    shown = degrees if unit == "celsius" else round(degrees * 9 / 5 + 32)
    return {
        "city": name.title(),
        "temperature": shown,
        "unit": unit,
        "sky": sky,
        "humidity_percent": humidity,
    }


def time_now(
    time_zone: Annotated[str, "IANA's name, such as Asia/Shanghai"] = "UTC",
) -> dict[str, str]:
    """The date, weekday and time now, in a time zone."""
    try:
        zone = timezone.utc if time_zone == "UTC" else ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"no time zone {time_zone[:40]!r}; give one as Asia/Shanghai") from None
    now = datetime.now(zone)
    return {
        "time": now.isoformat(timespec="seconds"),
        "weekday": now.strftime("%A"),
        "time_zone": time_zone,
    }


EXPRESSION_CHARACTERS = 500
BITS = 4096  # of an integer on the way
DEPTH = 50
Number = int | float


def bounded_power(base: Number, exponent: Number) -> Number:
    """base ** exponent, of a bounded size."""
    is_whole = isinstance(base, int) and isinstance(exponent, int)
    if is_whole and abs(base) > 1 and abs(exponent) * int(abs(base)).bit_length() > BITS:
        raise ValueError(f"a power of more than {BITS} bits")
    power = base**exponent
    if isinstance(power, complex):
        raise ValueError("the power is no real number")
    return power


def bounded_factorial(number: Number) -> int:
    if not isinstance(number, int) or not 0 <= number <= 400:
        raise ValueError("factorial takes whole numbers of 0 to 400")
    return math.factorial(number)


def bounded_round(number: Number, digits: Number = 0) -> Number:
    """round(), whose digits are bounded: 10 ** -digits is computed for whole numbers."""
    if not isinstance(digits, int) or abs(digits) > 30:
        raise ValueError("round takes -30 to 30 digits")
    return round(number, digits) if digits else round(number)


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: bounded_power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "radians": math.radians,
    "degrees": math.degrees,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": bounded_round,
    "abs": abs,
    "min": min,
    "max": max,
    "gcd": math.gcd,
    "factorial": bounded_factorial,
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(
    expression: Annotated[str, "in Python's notation, such as (3 + 4) * 2 ** 5 / sqrt(2)"],
) -> str:
    """The value of an arithmetic expression: + - * / // % **, and functions such as sqrt, log."""
    if len(expression) > EXPRESSION_CHARACTERS:
        raise ValueError(f"an expression has at most {EXPRESSION_CHARACTERS} characters")
    plain = expression.strip().replace("×", "*").replace("÷", "/")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None
    return str(calculate(tree.body, 0))


def calculate(node: ast.expr, depth: int) -> Number:
    """The value of an expression's tree. Raises ValueError, ArithmeticError."""
    if depth > DEPTH:
        raise ValueError(f"an expression nested deeper than {DEPTH} levels")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return bounded(+node.value)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return bounded(OPERATORS[type(node.op)](calculate(node.operand, depth + 1)))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left = calculate(node.left, depth + 1)
        return bounded(OPERATORS[type(node.op)](left, calculate(node.right, depth + 1)))
    if isinstance(node, ast.Call) and not node.keywords:
        return call_function(node, depth)
    raise ValueError(f"{ast.unparse(node)[:40]!r} is none of what a calculator knows")


def call_function(node: ast.Call, depth: int) -> Number:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name not in FUNCTIONS:
        raise ValueError(f"there is no function {ast.unparse(node.func)[:40]!r}")
    values = [calculate(argument, depth + 1) for argument in node.args]
    try:
        return bounded(FUNCTIONS[name](*values))
    except TypeError:
        raise ValueError(f"{name} does not take these {len(values)} numbers") from None


def bounded(number: Number) -> Number:
    """Raises ValueError where it is too large, or no number."""
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError("the value is no finite number")
    if isinstance(number, int) and number.bit_length() > BITS:
        raise ValueError(f"a whole number of more than {BITS} bits")
    return number


SAMPLES: dict[str, Callable[..., Any]] = {
    "weather": weather,
    "calculator": calculator,
    "clock": time_now,
}


def sample_registry() -> ToolRegistry:
    """The samples."""
    registry = ToolRegistry()
    for name, function in SAMPLES.items():
        registry.tool(name=name)(function)
    return registry
