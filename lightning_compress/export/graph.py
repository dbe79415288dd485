"""Tidying the graph that torch's exporter wrote: nothing twice, nothing unused, weights the way they are read."""

from __future__ import annotations

from typing import Any

from lightning_compress.export.nodes import TABLE

_PREFIX = "model."
_PURE = ("QuantizeLinear", "DequantizeLinear", "Clip", "Constant", "Cast", "Gather")


def tidy(proto: Any) -> Any:
    """Make an exported graph small and plain, without changing what it computes.

    - tensors that are equal are stored once, and rounding of one tensor to one grid happens once
    - a transposed DequantizeLinear of stored integers becomes one of stored transposed integers: the form in which
      runtimes recognize an integer matrix product
    - stored indices into a table of values, of which the exporter has no operator, become Cast and Gather
    - names lose what the exporter put around the model; its notes about source files go

    Args:
        proto: ``onnx.ModelProto``, changed in place.

    Returns:
        The same object.
    """
    graph = proto.graph
    _share_tensors(graph)
    _skip_identities(graph)
    _transpose_integers(graph)
    _take_values(proto)
    _share_tensors(graph)
    _share_nodes(graph)
    _drop_unused(graph)
    _shorten_names(graph)
    proto.doc_string = ""
    return proto


def _rename_inputs(graph: Any, names: dict[str, str]) -> None:
    """Let nodes read other tensors, also those of nested graphs."""
    if not names:
        return
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = names[name]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _rename_inputs(inner, names)


def _read(graph: Any) -> set[str]:
    """Names of the tensors that something reads."""
    names = {output.name for output in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                names |= _read(inner)
    return names


def _share_tensors(graph: Any) -> None:
    """Equal stored tensors become one."""
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    outputs = {output.name for output in graph.output}
    for tensor in graph.initializer:
        if tensor.name in outputs:
            continue
        named = tensor.name
        tensor.name = ""
        key = (tensor.data_type, tuple(tensor.dims), tensor.SerializeToString(deterministic=True))
        tensor.name = named
        if first.setdefault(key, named) != named:
            same[named] = first[key]
    _rename_inputs(graph, same)
    _keep(graph.initializer, [t for t in graph.initializer if t.name not in same])


def _skip_identities(graph: Any) -> None:
    """Who reads the Identity of a stored tensor reads the tensor."""
    stored = {t.name for t in graph.initializer}
    outputs = {output.name for output in graph.output}
    passed: dict[str, str] = {}
    for node in graph.node:
        source = passed.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Identity" and source in stored and node.output[0] not in outputs:
            passed[node.output[0]] = source
    _rename_inputs(graph, passed)
    _keep(graph.node, [n for n in graph.node if not (n.output and n.output[0] in passed)])


def _transpose_integers(graph: Any) -> None:
    import numpy as np
    import onnx

    stored = {t.name: t for t in graph.initializer}
    made = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in made:
            continue
        source = made[node.input[0]]
        permutation = list(next(a.ints for a in node.attribute if a.name == "perm"))
        values = onnx.numpy_helper.to_array(stored[source.input[0]])
        name = f"{source.input[0]}.transposed"
        if name not in stored:
            turned = np.ascontiguousarray(values.transpose(permutation))
            stored[name] = onnx.numpy_helper.from_array(turned, name)
            graph.initializer.append(stored[name])
        axes = [a for a in source.attribute if a.name == "axis"]
        turned_node = onnx.helper.make_node(
            "DequantizeLinear", [name, *source.input[1:]], list(node.output), node.name
        )
        if axes:
            turned_node.attribute.append(onnx.helper.make_attribute("axis", permutation.index(axes[0].i)))
        node.CopyFrom(turned_node)


def _take_values(proto: Any) -> None:
    """A weight of a table and indices: ONNX gathers by integers of four bytes, stored are those of one."""
    import onnx

    domain, _, kind = TABLE.partition("::")
    nodes: list[Any] = []
    for node in proto.graph.node:
        if (node.domain, node.op_type) == (domain, kind):
            table, codes = node.input
            wide = f"{node.output[0]}.indices"
            nodes.append(onnx.helper.make_node("Cast", [codes], [wide], to=onnx.TensorProto.INT32))
            nodes.append(onnx.helper.make_node("Gather", [table, wide], list(node.output), node.name, axis=0))
        else:
            nodes.append(node)
    _replace(proto.graph.node, nodes)
    _keep(proto.opset_import, [entry for entry in proto.opset_import if entry.domain != domain])


def _share_nodes(graph: Any) -> None:
    """The same rounding of the same tensor happens once, also where it is applied to what it gave."""
    first: dict[tuple[Any, ...], str] = {}
    outputs = {output.name for output in graph.output}
    same: dict[str, str] = {}
    dequantized: dict[tuple[str, ...], str] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
        if node.op_type == "DequantizeLinear":
            dequantized[node.output[0], *node.input[1:]] = node.input[0]
        if node.op_type == "QuantizeLinear" and tuple(node.input) in dequantized:
            same[node.output[0]] = dequantized[tuple(node.input)]
            continue
        if node.op_type in _PURE and node.output[0] not in outputs:
            options = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
            key = (node.op_type, tuple(node.input), options)
            if first.setdefault(key, node.output[0]) != node.output[0]:
                same[node.output[0]] = first[key]
    _rename_inputs(graph, same)
    _keep(graph.node, [n for n in graph.node if n.output[0] not in same])


def _drop_unused(graph: Any) -> None:
    while True:
        read = _read(graph)
        kept = [n for n in graph.node if any(name in read for name in n.output)]
        if len(kept) == len(graph.node):
            break
        _keep(graph.node, kept)
    _keep(graph.initializer, [t for t in graph.initializer if t.name in read])
    del graph.value_info[:]  # written again by whoever infers shapes


def _shorten_names(graph: Any) -> None:
    """Stored tensors have the names of the model; values between nodes are numbered."""
    fixed = {v.name for v in (*graph.input, *graph.output)}
    short: dict[str, str] = {}
    for tensor in graph.initializer:
        name = tensor.name.removeprefix(_PREFIX).replace("_quantizer.codes", "").replace("_quantizer.", ".")
        if name not in fixed and name not in short.values():
            short[tensor.name] = name
    taken = fixed | set(short.values()) | {t.name for t in graph.initializer}
    count = 0
    for node in graph.node:
        node.ClearField("doc_string")
        node.name = node.name.removeprefix("/").replace("/", ".").removeprefix(_PREFIX)
        for i, name in enumerate(node.output):
            if name and name not in fixed:
                while f"t{count}" in taken:
                    count += 1
                short[name] = node.output[i] = f"t{count}"
                count += 1
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    _rename_inputs(graph, short)


def _keep(field: Any, kept: list[Any]) -> None:
    """Leave out messages of a repeated field."""
    if len(kept) < len(field):
        _replace(field, kept)


def _replace(field: Any, messages: list[Any]) -> None:
    """Put other messages into a repeated field."""
    copies = [type(m).FromString(m.SerializeToString()) for m in messages]
    del field[:]
    field.extend(copies)
