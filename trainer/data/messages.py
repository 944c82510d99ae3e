"""Convert the messages of a conversation from the spellings in use to the one that chat templates take. Pure.

Every function raises ValueError with the reason and the remedy. The caller adds the file and the record's number.

TRL's own ``maybe_convert_to_chatml`` is not enough. It renames ``conversations``, ``from`` and ``value``, but leaves
ShareGPT's roles as they are (``human``, ``gpt``, ``function_call``), and chat templates refuse those or leave them out.
It also converts no tool calls, keeps no ``loss`` marks in one form, and lets a malformed message pass.
"""

from __future__ import annotations

import json
from typing import Any

from trainer.data.strict_json import NotJson, decoded

Message = dict[str, Any]

_CALL = "function_call"
_SYNONYMS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "bot", "chatbot", "model", "ai"),
    "tool": (
        "tool",
        "observation",
        "function",
        "ipython",
        "tool_response",
        "tool_result",
        "function_response",
        "function_result",
    ),
    _CALL: (_CALL, "tool_call"),
}
"""For each role that templates know, the names in ShareGPT, LLaMA-Factory, ms-swift, axolotl and OpenAI."""
_ROLES = {word: role for role, words in _SYNONYMS.items() for word in words}
ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys for the reasoning of an assistant before its answer. Some templates show it."""
LOSS = "loss"
"""The key that marks a message not to learn; its value is false. Other messages do not have it."""
_LOSS_KEYS = (LOSS, "train", "training", "trainable", "train_on_turn", "weight")
"""Names of that key in ms-swift (loss), axolotl (train, training, train_on_turn), Mistral and OpenAI (weight)."""
_NOTHING: tuple[Any, ...] = (None, "", {}, [])
_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "id", "name", LOSS}
_KNOWN_OF_CALLS = {"type", "id", "function"}
_KNOWN_OF_FUNCTIONS = {"name", "arguments"}


def turns(value: Any) -> list[Message]:
    """Return a conversation as messages with the keys ``role`` and ``content``, and their other keys.

    Keys without a value are left out, because tables add them to every message. ``function_call`` turns become
    ``tool_calls`` of an assistant message.
    """
    if isinstance(value, str):
        value = _parsed(value, "the conversation")
    if not isinstance(value, list) or not value:
        raise ValueError("the conversation is no list of messages")
    found: list[Message] = []
    for number, turn in enumerate(value, 1):
        try:
            _add(found, turn)
        except ValueError as error:
            raise ValueError(f"message {number} {error}") from None
    return found


def learned(messages: list[Message]) -> list[int]:
    """Return the indexes of the messages to learn: the assistant's, except those with ``loss: false``."""
    return [i for i, one in enumerate(messages) if one["role"] == "assistant" and one.get(LOSS, True)]


def for_template(messages: list[Message]) -> list[Message]:
    """Return the messages without our own mark ``loss``."""
    return [{key: value for key, value in one.items() if key != LOSS} for one in messages]


def other_keys(messages: list[Message]) -> set[str]:
    """Return the other keys of messages, with where they are. Only some chat templates show them."""
    found = {f"{key} of messages" for one in messages for key in one if key not in _KNOWN_KEYS}
    found |= {"name of messages" for one in messages if "name" in one and one["role"] != "tool"}
    for call in (call for one in messages for call in one.get("tool_calls", ())):
        found |= {f"{key} of tool calls" for key in call if key not in _KNOWN_OF_CALLS}
        found |= {f"{key} of tool calls" for key in call["function"] if key not in _KNOWN_OF_FUNCTIONS}
    return found


def with_system(messages: list[Message], system: str) -> list[Message]:
    """Put a system prompt first. Refuse a second one that differs."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        if not messages[0]["content"]:
            return [{**messages[0], "content": system}, *messages[1:]]
        raise ValueError("its system column and its first message are two different system prompts: keep one of them")
    return [{"role": "system", "content": system}, *messages]


def history(value: Any) -> list[Message]:
    """Return the earlier turns of an alpaca or query/response record: pairs of question and answer, or messages."""
    if isinstance(value, str):
        value = _parsed(value, "history")
    if not isinstance(value, list):
        raise ValueError("history is no list of pairs (question, answer)")
    if value and all(isinstance(one, dict) for one in value):
        try:
            return turns(value)
        except ValueError as error:
            raise ValueError(f"history: {error}") from None
    found: list[Message] = []
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise ValueError("history is no list of pairs (question, answer), each of two texts")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def tools(value: Any) -> str | None:
    """Return the tools of a record as JSON text in OpenAI's form, which TRL takes; None if it has none."""
    if isinstance(value, str):
        value = _parsed(value, "tools") if value.strip() else None
    if value in (None, [], {}):
        return None
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError("tools is no list of functions")
    return json.dumps([_tool(_parsed(one, "a tool") if isinstance(one, str) else one) for one in value])


def tool_names(value: str | None) -> list[str]:
    """Return the names of the tools in the result of :func:`tools`."""
    return [one["function"]["name"] for one in json.loads(value)] if value else []


def _tool(one: Any) -> dict[str, Any]:
    inner = one.get("function", one) if isinstance(one, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError("a tool has no name: each is {type: function, function: {name, description, parameters}}")
    return one if "function" in one else {"type": "function", "function": inner}


def _add(found: list[Message], turn: Any) -> None:
    if not isinstance(turn, dict):
        raise ValueError("is no object with role and content")
    rest = {key: value for key, value in turn.items() if value is not None}
    role, content = _one_of(rest, "role", "from"), _one_of(rest, "content", "value")
    if not isinstance(role, str):
        raise ValueError("has no role")
    word = "_".join(role.casefold().replace("-", " ").split())
    known, is_call = _ROLES.get(word), _ROLES.get(word) == _CALL
    if known is None:
        raise ValueError(f"has the role {role!r}: known are {', '.join(ROLES)}, function_call and their usual names")
    calls = [_call(one) for one in _listed(rest.pop("tool_calls", None), "tool_calls")]
    calls += [_call(one) for one in _listed(rest.pop("function_call", None), "function_call")]
    if is_call:
        calls += [_call(one) for one in _listed(content, "function_call")]
        known, content = "assistant", ""
        if not calls:
            raise ValueError("is a function_call without a name")
    is_learned = _loss(rest, known)
    if known == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    message: Message = {"role": known, "content": _content(content, may_lack=bool(calls))}
    if calls:
        if known != "assistant":
            raise ValueError(f"calls tools, and its role is {role!r}: only the assistant does")
        message["tool_calls"] = calls
    is_empty = not (message["content"] or calls or any(rest.get(key) for key in THOUGHTS))
    if known == "assistant" and is_learned and is_empty:
        raise ValueError("is an empty answer: take it out, or give it loss: false")
    last = found[-1] if found else None
    if is_call and last and last["role"] == "assistant" and (LOSS in last) is not is_learned:
        # Calls of one answer in turns of their own: templates expect one assistant message.
        last["tool_calls"] = [*last.get("tool_calls", []), *calls]
        for key, value in rest.items():
            if last.setdefault(key, value) != value:
                raise ValueError(f"belongs to the message before it, and has another {key}")
        return
    found.append({**message, **rest, **({} if is_learned or known != "assistant" else {LOSS: False})})


def _one_of(rest: Message, name: str, other: str) -> Any:
    """Take a value that has one of two names out of a message."""
    value, second = rest.pop(name, None), rest.pop(other, None)
    if value in _NOTHING:
        return second if second is not None else value
    if second not in (*_NOTHING, value):
        raise ValueError(f"has both {name} and {other}: keep one of them")
    return value


def _loss(rest: Message, role: str) -> bool:
    """Take the marks of what is learned out of a message, and return whether it is learned."""
    is_learned = True
    for key in _LOSS_KEYS:
        value = rest.pop(key, None)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(f"has {key} {value!r}: only 0 and 1, or false and true, can be honoured")
        if value and role != "assistant":
            raise ValueError(f"of the {role} has {key}: {json.dumps(value)}, and only answers are learned: take it out")
        is_learned = is_learned and bool(value)
    return is_learned


def _content(value: Any, *, may_lack: bool) -> str:
    if value is None:
        if may_lack:
            return ""
        raise ValueError("has no content")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(one) for one in value)
    raise ValueError(f"has content that is no text ({type(value).__name__})")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"has a part of type {kind}: training is on text only, also of a model of vision")
    if more := [key for key, value in part.items() if key not in ("type", "text") and value]:
        raise ValueError(f"has a part of type text with {more[0]}, which no text can keep: take it out")
    return str(part["text"])


def _call(one: Any) -> dict[str, Any]:
    """Return a tool call as templates take it, with its arguments as an object even if they were JSON text."""
    if isinstance(one, str):
        one = _parsed(one, "a tool call")
    call = {key: value for key, value in one.items() if value is not None} if isinstance(one, dict) else {}
    function, is_nested = call, isinstance(call.get("function"), dict)
    if is_nested:
        function = {key: value for key, value in call.pop("function").items() if value is not None}
    name = _one_of(function, "name", "function")
    if not isinstance(name, str):
        raise ValueError("has a tool call without a name: each is {name, arguments}")
    given = _one_of(function, "arguments", "parameters")
    if isinstance(given, str):
        given = _parsed(given, f"the arguments of {name}") if given.strip() else {}
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"calls {name} with arguments that are no object")
    if not is_nested:
        call = {key: function.pop(key) for key in ("type", "id") if key in function}
    return {"type": "function", **call, "function": {"name": name, "arguments": given or {}, **function}}


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value, name) if value.strip() else None
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _parsed(text: str, name: str) -> Any:
    try:
        return decoded(text)
    except NotJson as error:
        raise ValueError(f"has {name} that is no JSON ({error})") from None
