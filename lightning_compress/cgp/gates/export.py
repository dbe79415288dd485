"""Circuits as source code: a Python function, a Verilog module, and a test bench that checks it."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import Circuit, pretty
from lightning_compress.cgp.gates.functions import FUNCTIONS
from lightning_compress.energy import EnergyTable

# Reserved words of IEEE 1364-2005.
_VERILOG = re.findall(
    r"\w+",
    """
    always and assign automatic begin buf bufif0 bufif1 case casex casez cell cmos config deassign default
    defparam design disable edge else end endcase endconfig endfunction endgenerate endmodule endprimitive
    endspecify endtable endtask event for force forever fork function generate genvar highz0 highz1 if ifnone
    incdir include initial inout input instance integer join large liblist library localparam macromodule medium
    module nand negedge nmos nor noshowcancelled not notif0 notif1 or output parameter pmos posedge primitive
    pull0 pull1 pulldown pullup pulsestyle_ondetect pulsestyle_onevent rcmos real realtime reg release repeat
    rnmos rpmos rtran rtranif0 rtranif1 scalared showcancelled signed small specify specparam strong0 strong1
    supply0 supply1 table task time tran tranif0 tranif1 tri tri0 tri1 triand trior trireg unsigned use uwire
    vectored wait wand weak0 weak1 while wire wor xnor xor
    """,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_python(circuit: Circuit, name: str = "circuit", table: EnergyTable | None = None) -> str:
    """A function of the inputs that needs nothing else.

    Args:
        circuit: any.
        name: of the function.
        table: costs for the comment; None takes the default ones.

    Returns:
        Source text of ``wrap`` and of ``name(x)``, which takes a sequence of inputs and returns a list of outputs; a
        circuit with multiplexers takes the number of the data set modulo 2 as ``name(x, s)``.

    Raises:
        ValueError: the name is none.

    Examples:
        >>> from lightning_compress.cgp import Circuit, to_python
        >>> scope = {}
        >>> exec(to_python(Circuit.from_text("{2,1,1,1,2,1,1}([2]0,1,1)(2)")), scope)
        >>> scope["circuit"]([100, 100])
        [-56]
    """
    _check(name, [*keyword.kwlist, "wrap"])
    body = [
        f"    p{pin} = wrap({_formula(FUNCTIONS[number].formula, operands, circuit, 'x[{}]')})"
        for pin, number, operands in circuit.lines()
    ]
    outputs = ", ".join(_pin(pin, circuit, "x[{}]") for pin in circuit.outputs.tolist())
    return "\n".join(
        [
            "def wrap(v):",
            "    return (v + 128 & 255) - 128",
            "",
            "",
            f"def {name}(x{', s' if _selects(circuit) else ''}):",
            f"    # {pretty(circuit.cost(table))}",
            *body,
            f"    return [{outputs}]",
            "",
        ]
    )


def to_verilog(circuit: Circuit, name: str = "circuit", table: EnergyTable | None = None) -> str:
    """A combinational module of signed 8-bit wires, one assignment for each gate that takes part.

    Args:
        circuit: any.
        name: of the module.
        table: costs for the comment; None takes the default ones.

    Returns:
        Source text; inputs ``x0, x1, ...``, outputs ``y0, y1, ...``; with multiplexers also the input ``s``, the number
        of the data set modulo 2.

    Raises:
        ValueError: the name is none.
    """
    _check(name, _VERILOG)
    ports = ["  input s"] if _selects(circuit) else []
    ports += [f"  input signed [7:0] x{i}" for i in range(circuit.grid.inputs)]
    ports += [f"  output signed [7:0] y{i}" for i in range(circuit.grid.outputs)]
    body = [
        f"  wire signed [7:0] p{pin} = {_formula(FUNCTIONS[number].verilog, operands, circuit, 'x{}')};"
        for pin, number, operands in circuit.lines()
    ]
    body += [f"  assign y{i} = {_pin(p, circuit, 'x{}')};" for i, p in enumerate(circuit.outputs.tolist())]
    head = [f"// {pretty(circuit.cost(table))}", f"module {name} (", ",\n".join(ports), ");"]
    return "\n".join([*head, *body, "endmodule", ""])


def to_testbench(circuit: Circuit, x: npt.ArrayLike, name: str = "circuit") -> str:
    """A module that gives inputs to the one of ``to_verilog``, compares every output, and says PASS or FAIL.

    Args:
        circuit: any.
        x: int8 [cases, inputs]; with several data sets [cases, datasets, inputs].
        name: of the module under test.

    Returns:
        Source text of module ``{name}_test``; it ends the simulation with an error where an output differs.

    Raises:
        ValueError: the name is none, or the inputs are not those of the circuit.
    """
    _check(name, _VERILOG)
    rows, selects = circuit.evaluate(x), _selects(circuit)
    ports = [".s(s)"] if selects else []
    ports += [f".x{i}(x{i})" for i in range(circuit.grid.inputs)]
    ports += [f".y{i}(y{i})" for i in range(circuit.grid.outputs)]
    lines = [f"module {name}_test;", "  integer failed = 0;", *(["  reg s;"] if selects else [])]
    lines += [f"  reg signed [7:0] x{i};" for i in range(circuit.grid.inputs)]
    lines += [f"  wire signed [7:0] y{i};" for i in range(circuit.grid.outputs)]
    lines += [f"  {name} under_test ({', '.join(ports)});", "  initial begin"]
    cases = math.prod(rows.shape[:-1])
    given = np.asarray(x).reshape(cases, circuit.grid.inputs).tolist()
    for case, (values, wanted) in enumerate(
        zip(given, rows.reshape(cases, circuit.grid.outputs).tolist(), strict=True)
    ):
        lines += [f"    s = {case % circuit.grid.datasets % 2};"] if selects else []
        lines += [f"    x{i} = {_constant(v)};" for i, v in enumerate(values)]
        lines += [
            "    #1;",
            *(f"    if (y{i} !== {_constant(v)}) failed = failed + 1;" for i, v in enumerate(wanted)),
        ]
    lines += [
        '    if (failed == 0) $display("PASS");',
        '    else begin $display("FAIL: %0d outputs differ", failed); $fatal; end',
        "    $finish;",
        "  end",
        "endmodule",
    ]
    return "\n".join([*lines, ""])


def _selects(circuit: Circuit) -> bool:
    return any(FUNCTIONS[number].selects for _, number, _ in circuit.lines())


def _constant(value: int) -> str:
    return f"8'sh{value & 255:02x}"


def _pin(pin: int, circuit: Circuit, pattern: str) -> str:
    return pattern.format(pin) if pin < circuit.grid.inputs else f"p{pin}"


def _formula(text: str, operands: Sequence[int], circuit: Circuit, pattern: str) -> str:
    names = iter([_pin(pin, circuit, pattern) for pin in operands])
    found = {letter: next(names) for letter in "ab" if re.search(rf"\b{letter}\b", text)}
    return re.sub(r"\b[ab]\b", lambda m: found[m[0]], text)


def _check(name: str, reserved: Sequence[str]) -> None:
    if not _NAME.fullmatch(name) or name in reserved:
        raise ValueError(f"name={name!r}: letters, digits and _ are allowed, and no word of the language.")
