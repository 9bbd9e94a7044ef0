"""Reads pickles that have classes and functions in them, as cloudpickle and dill write those of scripts and notebooks.

    NEWOBJ, NEWOBJ_EX    the class is the result of a call, as of ``_make_skeleton_class(type, "Net", bases, ...)``
    REDUCE, POP          a call only for what it does to an object: ``_class_setstate(cls, attributes)``

Both stay stand-ins: the class is the `PyObject` of its call, and the ``maker`` of its objects; the second call is kept
in the ``calls`` of the object that it fills. Nothing is called. The machine is CPython's in Python, of which three
opcodes are replaced; `pickling.load.scan` has read the opcodes before.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from ckptool.core.tree import Global, PyObject
from ckptool.errors import FormatError
from ckptool.limits import MAX_GLOBALS, MAX_NAME

_InPython: Any = pickle._Unpickler  # the type checker does not know its methods


class _Unpickler(_InPython):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_InPython.dispatch)

    def __init__(
        self, stream: io.BytesIO, find_class: Callable[[str, str], Any], pid: Callable[[Any], Any], encoding: str
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self.find_class, self.persistent_load = find_class, pid
        self.classes: dict[tuple[str, str], Global] = {}
        self.result: Any = None

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.append(self.instance(self.stack.pop(), args, {}))

    def load_newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.append(self.instance(self.stack.pop(), args, kwargs))

    def instance(self, kind: Any, args: Any, kwargs: Any) -> PyObject:
        """Returns a new object of a class: a `Global`, or the stand-in of one that a call made."""
        if isinstance(kind, Global):
            return PyObject.__new__(kind, *args, **kwargs)  # type: ignore[arg-type]
        if not isinstance(kind, PyObject):
            raise FormatError(f"the pickle makes an object of a {type(kind).__name__}, which is no class")
        made = self.named(kind)(*args, **kwargs)
        made.called, made.maker = False, kind
        return made

    def named(self, made: PyObject) -> Global:
        """Returns the class under the name that the call that made it gives: its first text, and a ``__module__``."""
        given = made.args[:8]
        name = next((one for one in given if isinstance(one, str)), made.qualname)
        module = next((one["__module__"] for one in given if isinstance(one, dict) and "__module__" in one), None)
        key = module if isinstance(module, str) else made.module, name
        if key not in self.classes:
            if len(self.classes) >= MAX_GLOBALS.now():
                raise MAX_GLOBALS.passed("the pickle makes too many classes")
            if (length := len(key[0]) + len(name)) > MAX_NAME.now():
                raise MAX_NAME.passed(f"a class has a name of {length:,} characters", length)
            self.classes[key] = Global.named(*key)
        return self.classes[key]

    def load_reduce(self) -> None:
        super().load_reduce()
        self.result = self.stack[-1]

    def load_pop(self) -> None:
        dropped = self.stack[-1] if self.stack else None
        super().load_pop()
        if dropped is None or dropped is not self.result or not isinstance(dropped, PyObject):
            return
        for filled in (*self.stack[-1:], *dropped.args[:1]):
            if isinstance(filled, PyObject):
                filled.calls = filled.calls or []
                filled.calls.append(dropped)
                return

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.POP[0]] = load_pop


unpickler = _Unpickler
