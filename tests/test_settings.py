from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from obsfs.cli.options import parse_mount_options
from obsfs.errors import ObsfsError, SettingWarning, UsageError
from obsfs.paths import config_path
from obsfs.settings import GivenValue, Settings, keywords, knobs
from obsfs.values import parse_seconds, parse_size


def test_flags_beat_variables_beat_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_text('connections = 3\ncache_size = "7GiB"\nregion = "from-file"\n')
    assert Settings.load().connections == 3
    assert Settings.load().cache_size == 7 << 30
    monkeypatch.setenv("OBSFS_CONNECTIONS", "5")
    assert Settings.load().connections == 5
    assert Settings.load(connections="9", region=None).connections == 9
    assert Settings.load().region == "from-file"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cache_size": "lots"}, "--cache-size lots"),
        ({"connections": 0}, "--connections 0"),
        ({"metadata_ttl": "soon"}, "--metadata-ttl soon"),
        ({"fuse_backend": "warp"}, "--fuse-backend warp"),
        ({"umask": "9"}, "--umask 9"),
        ({"umask": "1777"}, "--umask 1777"),
        ({"uid": "-1"}, "--uid -1"),
        ({"passthrough": "maybe"}, "--passthrough maybe"),
        ({"cache_dir": "~nobody-here/x"}, "--cache-dir ~nobody-here/x"),
        ({"cache_dirr": "x"}, "unknown setting 'cache_dirr'"),
    ],
)
def test_a_mistake_is_named_in_one_line(given: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.load(**given)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OBSFS_CONFIG", str(tmp_path / "broken.toml"))
    (tmp_path / "broken.toml").write_text("connections =")
    with pytest.raises(UsageError, match=r"broken\.toml"):
        Settings.load()


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("500ms", 0.5), ("5m", 300), ("2h", 7200), ("7d", 604800)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), (5, 5), ("1.5 GiB", 3 << 29), ("10mb", 10_000_000), ("2KB", 2000), ("7T", 7 * 10**12)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1 XiB", "GiB", "1ib", "1e3", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_another_process_gets_the_same(tmp_path: Path) -> None:
    settings = Settings.load(cache_dir=tmp_path, uid="7", umask="027", endpoint_url=["http://a", "http://b"])
    assert (settings.uid, settings.umask, settings.endpoint_urls) == (7, 0o027, ("http://a", "http://b"))
    assert Settings.parse(json.loads(json.dumps(settings.to_json()))) == settings


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSFS_PASSTHROUGH", "off")
    monkeypatch.setenv("OBSFS_REGION", "")
    assert not Settings.load().passthrough
    assert Settings.load().region is None


def test_errors_are_one_line() -> None:
    assert str(ObsfsError("it broke", "mend\n  it")) == "it broke: mend it"
    assert str(ObsfsError("it broke")) == "it broke"


def _write_config(text: str) -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_text(text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('cache_sise = "1GiB"', "'cache_sise' is not a setting and is not used: did you mean 'cache_size'?"),
        ('cache-size = "1GiB"', "'cache-size' is not a setting and is not used: did you mean 'cache_size'?"),
        ('"a\\u001bb" = 1', r"'a\x1bb' is not a setting and is not used: see `obsfs mount --help`"),
        ("[mount.models]", "'mount' is not a setting and is not used"),
        ("[obsfs]\nregion = 'x'", "'obsfs' is not a setting and is not used: write its keys without [obsfs]"),
        ('CACHE-SIZE = "1GiB"', "'CACHE-SIZE' is not a setting and is not used: did you mean 'cache_size'?"),
    ],
)
def test_a_key_that_is_not_a_setting_is_told_with_its_file(line: str, said: str) -> None:
    _write_config(f"connections = 3\n{line}\n")
    with pytest.warns(SettingWarning) as told:
        assert Settings.load().connections == 3
    assert len(told) == 1
    assert str(told[0].message).startswith(f"{config_path()}: {said}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OBSFS_CACHE_SIZ", "OBSFS_CACHE_SIZE"),
        ("OBSFS_REGOIN", "OBSFS_REGION"),
        ("OBSFS_SECRET_ACESS_KEY", "OBSFS_SECRET_ACCESS_KEY"),
        ("OBSFS_Cache_Dir", "OBSFS_CACHE_DIR"),
        ("OBSFS_SECRET_KEY", "OBSFS_SECRET_ACCESS_KEY"),
        ("OBFS_CACHE_DIR", "OBSFS_CACHE_DIR"),
        ("OBSSF_REGION", "OBSFS_REGION"),
        ("obsfs_library", "OBSFS_LIBRARY"),
    ],
)
def test_a_variable_that_looks_like_a_typo_is_told_without_its_value(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "TheValue")
    with pytest.warns(SettingWarning) as told:
        Settings.load()
    assert [str(one.message) for one in told] == [f"the variable {name} is not used: did you mean {meant}?"]


@pytest.mark.parametrize(
    "name",
    ["OBSFS_SERVICE_HOST", "OBSFS_PORT_80_TCP", "OBSFS_TEST_KILLS", "OBSFS_", "OBSFS_HOME", "OBS_REGION", "OBJFS_X"],
)
@pytest.mark.filterwarnings("error")
def test_other_variables_are_nobody_s_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    Settings.load()


def test_a_wrong_value_is_told_with_the_place_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    _write_config("connections = 0\n")
    with pytest.raises(UsageError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f"{config_path()}: connections = 0: ")
    monkeypatch.setenv("OBSFS_CONNECTIONS", "many")
    with pytest.raises(UsageError, match=r"^OBSFS_CONNECTIONS=many: "):
        Settings.load()
    with pytest.raises(UsageError, match=r"^--connections 999: "):
        Settings.load(connections="999")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("connections = 0", "it must be at least 1"),
        ("connections = 300", "it must be at most 256"),
        ("cache_size = 5", "it must be at least 16MiB"),
        ("endpoint_url = 5", "it must be text"),
        ('cache_size = "99999999999999999999PiB"', "it must be at most 1EiB"),
        ('cache_min_free = "1152921504606846977"', "it must be at most 1EiB"),
        (f'read_ahead = "{"9" * 5000}"', "it must be at most 1EiB"),
        (f'metadata_ttl = "{"9" * 400}w"', "it must be at most 3650d"),
        ('retry_timeout = "600w"', "it must be at most 3650d"),
        ('request_timeout = "25h"', "it must be at most 1d"),
        ('kernel_read_ahead = "1073741825"', "it must be at most 1GiB"),
        ('uid = "4294967295"', "it must be at most 4294967294"),
        (f'max_entries = "{"9" * 99}"', "it must be at most 1000000000"),
        (r'cache_dir = "/tmp/a\u0000b"', "it holds a NUL"),
        (r'profile = "a\u0000b"', "it holds a NUL"),
        ('max_entries = "many"', "it must be a whole number"),
        ("cache_dir = 5", "it must be text"),
        ("metadata_ttl = 2026-01-01", "'2026-01-01' is not a time; write for example 90, 500ms, 5m, 2h or 7d"),
        ("umask = 22", 'write it as text, in octal: umask = "022"'),
        ("umask = 0o22", 'write it as text, in octal: umask = "022"'),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_words(line: str, said: str) -> None:
    _write_config(line)
    with pytest.raises(UsageError) as caught:
        Settings.load()
    assert str(caught.value).endswith(f": {said}")


def test_the_greatest_values_are_ones_that_the_system_takes(tmp_path: Path) -> None:
    given = {"cache_size": "1EiB", "retry_timeout": "3650d", "request_timeout": "1d", "uid": str(2**32 - 2)}
    settings = Settings.load(**given)
    assert settings.cache_size == 1 << 60
    reader, writer = os.pipe()
    os.close(writer)  # which is told at once
    poll = select.poll()
    poll.register(reader)
    assert poll.poll(settings.request_timeout * 1000)
    os.close(reader)
    event = threading.Event()
    event.set()
    assert event.wait(settings.retry_timeout)
    os.chown(tmp_path, settings.uid or 0, -1)


@pytest.mark.parametrize("name", ["region", "profile", "library", "snapshot", "endpoint_url"])
def test_text_is_utf_8(name: str) -> None:
    with pytest.raises(UsageError, match="it is not UTF-8"):
        Settings.load(**{name: os.fsdecode(b"a\xff")})


def test_a_directory_may_have_any_name() -> None:
    assert os.fsencode(Settings.load(cache_dir=os.fsdecode(b"/a\xff")).cache_dir) == b"/a\xff"


@pytest.mark.parametrize("name", [name for name, knob in knobs().items() if knob.type is not bool])
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_no_setting_is_empty(name: str, blank: str) -> None:
    with pytest.raises(UsageError, match=rf"^-o {name} is empty"):
        Settings.load(**{name: GivenValue(f"-o {name}=", blank)})


def test_a_variable_that_is_empty_is_not_set_and_one_of_blanks_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSFS_CACHE_DIR", "")
    Settings.load()
    monkeypatch.setenv("OBSFS_CACHE_DIR", " ")
    with pytest.raises(UsageError, match=r"^OBSFS_CACHE_DIR is empty"):
        Settings.load()
    _write_config('library = ""')
    with pytest.raises(UsageError) as caught:
        Settings.load(cache_dir="/c")
    assert str(caught.value).startswith(f"{config_path()}: library is empty")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("uid", "4294967295", "it must be at most 4294967294"),
        ("metadata_ttl", "4000d", "it must be at most 3650d"),
        ("umask", "1777", "'1777' is not an octal mask"),
        ("umask", "-22", "'-22' is not an octal mask"),
        ("library", "models", "write obs://BUCKET"),
    ],
)
def test_a_program_is_told_its_own_spelling(name: str, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.load(**keywords({name: text}))
    assert str(caught.value).startswith(f"{name}={text}: {said}")


def test_where_a_value_stands_is_known_later_and_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    _write_config('profile = "from-file"\n')
    monkeypatch.setenv("OBSFS_REGION", "here")
    chosen = Settings.load(endpoint_url=GivenValue("-o endpoint-url=", "http://a"), library="obs://models")
    assert [chosen.place(name) for name in ("profile", "region", "endpoint_url", "library")] == [
        f"{config_path()}: profile = ",
        "OBSFS_REGION=",
        "-o endpoint-url=",
        "--library ",
    ]
    assert chosen.at_first_endpoint().place("region") == "OBSFS_REGION="
    assert set(chosen.to_json()) == set(knobs())
    assert Settings.parse(chosen.to_json()) == chosen


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_bytes(b"\xef\xbb\xbfconnections = 3\r\n")
    assert Settings.load().connections == 3


def test_a_file_that_was_named_and_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.toml", "there is no such file"), (tmp_path, "Is a directory")):
        monkeypatch.setenv("OBSFS_CONFIG", str(path))
        with pytest.raises(UsageError, match=said):
            Settings.load()
    monkeypatch.setenv("OBSFS_CONFIG", "/dev/null")
    Settings.load()


# names of the version before


def _by_flag(name: str, value: str) -> Settings:
    return Settings.load(**{name: value})


def _by_keyword(name: str, value: str) -> Settings:
    return Settings.load(**keywords({name: value}, _by_flag))


def _by_option(name: str, value: str) -> Settings:
    return Settings.load(**parse_mount_options(f"{name}={value}"))


def _by_variable(name: str, value: str) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"OBSFS_{name.upper()}", value)
        return Settings.load()


def _by_file(name: str, value: str) -> Settings:
    _write_config(f'{name} = "{value}"\n')
    return Settings.load()


@pytest.mark.parametrize(
    ("load", "old", "new"),
    [
        (_by_flag, "--engine", "--fuse-backend"),
        (_by_keyword, "engine", "fuse_backend"),
        (_by_option, "-o engine", "-o fuse_backend"),
        (_by_variable, "OBSFS_ENGINE", "OBSFS_FUSE_BACKEND"),
        (_by_file, "config.toml: engine", "config.toml: fuse_backend"),
    ],
)
@pytest.mark.parametrize("value", ["native", "fusepy", "libfuse"])
def test_an_old_name_works_as_the_new_one_and_warns(
    load: Callable[[str, str], Settings], old: str, new: str, value: str
) -> None:
    wanted = {"fusepy": "libfuse"}.get(value, value)
    with pytest.warns(SettingWarning) as told:
        assert load("engine", value).fuse_backend == wanted
    said = [str(one.message) for one in told]
    names = [text for text in said if "is the old name of a setting" in text]
    assert len(names) == 1
    assert f"{old} is the old name of a setting: write " in names[0]
    assert names[0].endswith(new)
    assert [text for text in said if text not in names] == (
        ["the FUSE backend 'fusepy' has a new name: write 'libfuse'"] if value == "fusepy" else []
    )


@pytest.mark.parametrize("load", [_by_flag, _by_keyword, _by_option, _by_variable, _by_file])
@pytest.mark.filterwarnings("error")
def test_the_new_name_does_not_warn(load: Callable[[str, str], Settings]) -> None:
    assert load("fuse_backend", "libfuse").fuse_backend == "libfuse"


@pytest.mark.filterwarnings("ignore::obsfs.errors.SettingWarning")
def test_the_new_name_wins_over_the_old_one_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load(engine="native", fuse_backend="libfuse").fuse_backend == "libfuse"
    _write_config('fuse_backend = "libfuse"\nengine = "native"\n')
    assert Settings.load().fuse_backend == "libfuse"
    monkeypatch.setenv("OBSFS_ENGINE", "native")
    assert Settings.load().fuse_backend == "native", "a variable beats the file"
    monkeypatch.setenv("OBSFS_FUSE_BACKEND", "libfuse")
    assert Settings.load().fuse_backend == "libfuse"


def test_settings_of_an_earlier_version_are_adopted() -> None:
    for value, wanted in (("native", "native"), ("libfuse", "libfuse")):
        settings, notes = Settings.adopt({"engine": value})
        assert (settings.fuse_backend, notes) == (wanted, [])
