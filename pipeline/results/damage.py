"""What is wrong with a record that pydantic refuses, in one line."""

from pydantic import ValidationError


def first_problem(error: ValidationError) -> str:
    """The first problem, behind the place where it is: `seconds.values: Input should be ...`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
