"""What is wrong with a record that pydantic refuses, in one line."""

from pydantic import ValidationError

from pipeline.printable import one_line


def first_problem(error: ValidationError) -> str:
    """The first problem, behind the place where it is: `seconds.values: Input should be ...`.

    The place may be a name that stands in the file, with whatever is in it.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return one_line(f"{where}: {first['msg']}" if where else first["msg"])
