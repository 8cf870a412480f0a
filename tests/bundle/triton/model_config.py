"""The part of Triton's `model_config.proto` that is written, so that protobuf's own parser reads what was written."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

from moeca_compile.dtypes import DTYPES

ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_UINT64", *(names.triton for names in DTYPES.values())],
    "InstanceKind": ["KIND_AUTO", "KIND_CPU"],
    "Kind": [f"CONTROL_SEQUENCE_{name}" for name in ("START", "READY", "END", "CORRID")],
}
MESSAGES: dict[str, dict[str, str]] = {  # by message and field: the type; "*": repeated
    "ModelConfig": {
        "name": "string", "backend": "string", "max_batch_size": "int32", "default_model_filename": "string",
        "input": "Tensor*", "output": "Tensor*", "sequence_batching": "SequenceBatching", "parameters": "Parameter*",
        "instance_group": "InstanceGroup*",
    },
    "Tensor": {
        "name": "string", "data_type": "DataType", "dims": "int64*", "reshape": "Shape", "allow_ragged_batch": "bool",
    },
    "Shape": {"shape": "int64*"},
    "InstanceGroup": {"kind": "InstanceKind", "count": "int32"},
    "Parameter": {"key": "string", "value": "Value"},
    "Value": {"string_value": "string"},
    "SequenceBatching": {
        "max_sequence_idle_microseconds": "uint64", "control_input": "ControlInput*", "oldest": "Oldest",
        "state": "State*",
    },
    "Oldest": {"max_candidate_sequences": "int32", "max_queue_delay_microseconds": "uint64"},
    "ControlInput": {"name": "string", "control": "Control*"},
    "Control": {"kind": "Kind", "int32_false_true": "int32*", "data_type": "DataType"},
    "State": {
        "input_name": "string", "output_name": "string", "data_type": "DataType", "dims": "int64*", "reshape": "Shape",
        "initial_state": "InitialState*",
    },
    "InitialState": {
        "name": "string", "data_type": "DataType", "dims": "int64*", "reshape": "Shape", "zero_data": "bool",
    },
}  # fmt: skip


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="excerpt.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            entry = message.field.add(name=field, number=number, label=3 if kind.endswith("*") else 1)
            kind = kind.removesuffix("*")
            if kind in MESSAGES or kind in ENUMS:
                entry.type_name, entry.type = f".inference.{kind}", 11 if kind in MESSAGES else 14
            else:
                entry.type = entry.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


ModelConfig = _model_config()


def parse(text: str) -> dict[str, Any]:
    """A `config.pbtxt`, as protobuf reads it; 64-bit numbers as numbers."""
    config = text_format.Parse(text, ModelConfig())
    found: dict[str, Any] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return _numbers(found)


def _numbers(value: Any, key: str = "") -> Any:
    """protobuf's JSON has 64-bit numbers as text."""
    if isinstance(value, dict):
        return {name: _numbers(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner, key) for inner in value]
    return int(value) if key in ("dims", "shape", "max_sequence_idle_microseconds") else value
