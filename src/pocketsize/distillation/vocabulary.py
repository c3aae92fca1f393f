"""Whether a teacher and a student mean the same tokens."""

from __future__ import annotations

from collections.abc import Mapping


def aligned(
    student: Mapping[str, int], teacher: Mapping[str, int], student_rows: int, teacher_rows: int
) -> list[int] | None:
    """The teacher's number of each of the student's tokens, None where both count alike.

    Vocabularies map tokens to numbers; `rows` are those of the embeddings, which may be padded. Rows that
    no token of the student has stand for the teacher's row of the same number. A student's token that the
    teacher has not is a ValueError that names the first.
    """
    if (
        all(teacher.get(token) == number for token, number in student.items())
        and student_rows <= teacher_rows
    ):
        return None
    missing = min(
        ((number, token) for token, number in student.items() if token not in teacher), default=None
    )
    if missing is not None:
        number, token = missing
        raise ValueError(
            f"token {number} of the student, {token!r}, is none of the teacher's; both need one tokenizer, "
            "or the student's tokens have to be among the teacher's"
        )
    found = [min(row, teacher_rows - 1) for row in range(student_rows)]
    for token, number in student.items():
        found[number] = teacher[token]
    return found
