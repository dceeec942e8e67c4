"""Store URLs: what they mean, which are refused, and that no password is ever shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam_state import ConfigError, HornbeamError, StoreConfig, open_store

MIB = 1024 * 1024
SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("lmdb:///srv/app", {"scheme": "lmdb", "path": Path("/srv/app")}, id="lmdb"),
        pytest.param("lmdb:///srv/a%20b%25c", {"path": Path("/srv/a b%c")}, id="lmdb-escaped"),
        pytest.param("lmdb:///srv/a b", {"path": Path("/srv/a b")}, id="lmdb-space"),
        pytest.param("lmdb:///srv/caf\u00e9", {"path": Path("/srv/caf\u00e9")}, id="lmdb-non-ascii"),
        pytest.param("lmdb:///srv/caf%C3%A9", {"path": Path("/srv/caf\u00e9")}, id="lmdb-escaped-utf8"),
        pytest.param("lmdb:///srv/x?state_size=2097152", {"path": Path("/srv/x"), "state_size": 2 * MIB}, id="lmdb-state-size"),
        pytest.param("lmdb:///srv/x?cache_size=2097152&timeout=2.5", {"cache_size": 2 * MIB, "timeout": 2.5}, id="lmdb-two-options"),
        pytest.param("redis://h/0?near_size=0", {"near_size": 0, "url": "redis://h/0"}, id="redis-near-size-none"),
        pytest.param("unix:///s?near_size=1000", {"near_size": 1000, "url": "unix:///s"}, id="unix-near-size"),
        pytest.param("memory://", {"scheme": "memory", "path": None, "url": "memory://"}, id="memory"),
        pytest.param("memory://?cache_size=1048576", {"scheme": "memory", "cache_size": MIB}, id="memory-option"),
        pytest.param("redis://host", {"scheme": "redis", "url": "redis://host", "path": None}, id="redis-bare"),
        pytest.param("redis://host:6380/3", {"url": "redis://host:6380/3"}, id="redis-port-database"),
        pytest.param("redis://host/", {"url": "redis://host/"}, id="redis-slash"),
        pytest.param("redis://[::1]:6379/0", {"url": "redis://[::1]:6379/0"}, id="redis-ipv6"),
        pytest.param("rediss://u:p@host/0?timeout=3", {"scheme": "rediss", "url": "rediss://u:p@host/0", "timeout": 3.0}, id="rediss-option-taken-out"),
        pytest.param("redis://host/0?timeout=3&health_check_interval=5", {"url": "redis://host/0?health_check_interval=5"}, id="redis-foreign-option-kept"),
        pytest.param("redis://:p%40s%2Fs@host/0", {"url": "redis://:p%40s%2Fs@host/0"}, id="redis-escaped-password"),
        pytest.param("unix:///run/redis.sock", {"scheme": "unix", "url": "unix:///run/redis.sock"}, id="unix"),
        pytest.param("unix:///run/redis.sock?db=2&timeout=1.5", {"url": "unix:///run/redis.sock?db=2", "timeout": 1.5}, id="unix-options"),
        pytest.param("redis+sentinel://h1,h2:27000/shop", {"scheme": "redis+sentinel", "hosts": (("h1", 26379), ("h2", 27000)), "service": "shop"}, id="sentinel"),
        pytest.param("rediss+sentinel://u:p%2Cw@[::1]:1,[::2]/sh%20op/3?sentinel_password=s&timeout=2", {"hosts": (("::1", 1), ("::2", 26379)), "service": "sh op", "timeout": 2.0, "url": "rediss+sentinel://u:p%2Cw@[::1]:1,[::2]/sh%20op/3?sentinel_password=s"}, id="sentinel-everything"),
        pytest.param("redis+cluster://h1:7000,h2", {"scheme": "redis+cluster", "hosts": (("h1", 7000), ("h2", 6379)), "service": ""}, id="cluster"),
        pytest.param("rediss+cluster://:p,w@h1/0?db=0", {"scheme": "rediss+cluster", "hosts": (("h1", 6379),)}, id="cluster-database-0"),
    ],
)  # fmt: skip
def test_a_good_url_is_understood(url, expected):
    """Scheme, place and options come out as they were written."""
    config = StoreConfig.from_url(url)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.fallback is False


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param("", "no scheme", id="empty"),
        pytest.param("/srv/app", "no scheme", id="bare-path"),
        pytest.param("lmdb:/srv/app", "no scheme", id="one-slash"),
        pytest.param(None, "no scheme", id="none"),
        pytest.param(Path("/srv/app"), "no scheme", id="path-object"),
        pytest.param(b"memory://", "no scheme", id="bytes"),
        pytest.param("http://host", "'http' is not known", id="wrong-scheme"),
        pytest.param("LMDB:///srv/app", "'LMDB' is not known", id="upper-case"),
        pytest.param(" lmdb:///srv/app", "is not known", id="leading-space"),
        pytest.param("sqlite:///srv/app", "lmdb:///absolute/directory", id="scheme-message-shows-forms"),
        pytest.param("lmdb://relative/dir", "lmdb:///relative/dir", id="lmdb-relative"),
        pytest.param("lmdb://", "not absolute", id="lmdb-empty"),
        pytest.param("lmdb://?timeout=1", "not absolute", id="lmdb-only-options"),
        pytest.param("lmdb:///srv/my#app", "", id="lmdb-fragment"),
        pytest.param("lmdb:///srv/a%00b", "", id="lmdb-nul"),
        pytest.param("lmdb:///srv/x?sate_size=1", "'sate_size' is not known", id="lmdb-unknown-option"),
        pytest.param("memory://?size=1", "'size' is not known", id="memory-unknown-option"),
        pytest.param("lmdb:///srv/x?timeout=soon", "timeout='soon' is not a number", id="timeout-text"),
        pytest.param("lmdb:///srv/x?timeout=", "is not a number", id="timeout-empty"),
        pytest.param("lmdb:///srv/x?timeout=0", "above 0", id="timeout-zero"),
        pytest.param("lmdb:///srv/x?timeout=-1", "above 0", id="timeout-negative"),
        pytest.param("lmdb:///srv/x?timeout=61", "at most 60", id="timeout-long"),
        pytest.param("lmdb:///srv/x?timeout=nan", "timeout", id="timeout-nan"),
        pytest.param("lmdb:///srv/x?timeout=inf", "timeout", id="timeout-inf"),
        pytest.param("lmdb:///srv/x?state_size=64MB", "is not a number", id="size-with-unit"),
        pytest.param("lmdb:///srv/x?state_size=1048575", "state_size", id="state-size-small"),
        pytest.param("lmdb:///srv/x?cache_size=0", "cache_size", id="cache-size-zero"),
        pytest.param("lmdb:///srv/x?cache_size=-5", "cache_size", id="cache-size-negative"),
        pytest.param("redis://h?near_size=-1", "near_size", id="near-size-negative"),
        pytest.param("redis://h?near_size=32MB", "is not a number", id="near-size-with-unit"),
        pytest.param(f"redis://h?near_size={2**64}", "near_size", id="near-size-beyond-64-bits"),
        pytest.param(f"lmdb:///srv/x?state_size={2**64}", "state_size", id="state-size-beyond-64-bits"),
        pytest.param("redis://", "no host", id="redis-no-host"),
        pytest.param("redis:///0", "no host", id="redis-no-host-database"),
        pytest.param("redis://:6379/0", "no host", id="redis-only-port"),
        pytest.param("redis://host:port/0", "port", id="redis-port-text"),
        pytest.param("redis://host:0/0", "port", id="redis-port-zero"),
        pytest.param("redis://host:65536", "port", id="redis-port-large"),
        pytest.param("redis://host:-1", "port", id="redis-port-negative"),
        pytest.param("redis://host/zero", "'zero' is not a number", id="redis-database-text"),
        pytest.param("redis://host/-1", "not a number", id="redis-database-negative"),
        pytest.param("redis://host/\u00b2", "not a number", id="redis-database-superscript"),
        pytest.param("redis://[::1/0", "", id="redis-open-bracket"),
        pytest.param("redis://h\u2100st/0", "", id="redis-host-with-odd-letter"),
        pytest.param("redis://host?timeout=x", "is not a number", id="redis-option-text"),
        pytest.param("unix://", "no socket", id="unix-empty"),
        pytest.param("unix:///", "no socket", id="unix-slash"),
        pytest.param("redis+sentinel://h1,h2", "redis+sentinel://host:26379,host:26379/service/0", id="sentinel-no-service"),
        pytest.param("redis+sentinel://h1//0", "names no service", id="sentinel-empty-service"),
        pytest.param("redis+sentinel://h1/shop/x", "'x' is not a number", id="sentinel-database-text"),
        pytest.param("redis+sentinel:///shop", "no host", id="sentinel-no-host"),
        pytest.param("redis+sentinel://h1,,h2/shop", "no host", id="sentinel-empty-host"),
        pytest.param("redis+sentinel://h1,h2:0/shop", "port", id="sentinel-port-zero"),
        pytest.param("redis+sentinel://u:p@h1,u:p@h2/shop", "more than one @", id="sentinel-two-logins"),
        pytest.param("redis+cluster://h1:x,h2", "port", id="cluster-port-text"),
        pytest.param("redis+cluster://h1/1", "no database '1'", id="cluster-database"),
        pytest.param("redis+cluster://h1?db=2", "no database '2'", id="cluster-database-option"),
        pytest.param("redis+cluster://", "no host", id="cluster-no-host"),
        pytest.param("redis+cluster://h\u2100st,h2", "", id="cluster-host-with-odd-letter"),
        pytest.param("unix+cluster:///run/redis.sock", "is not known", id="cluster-socket"),
    ],
)  # fmt: skip
def test_a_bad_url_is_refused_with_what_to_write(url, message):
    """Every mistake is a ConfigError (also a ValueError) that names it, when the store is made."""
    with pytest.raises(ConfigError) as caught:
        StoreConfig.from_url(url)
    assert message in str(caught.value)
    assert isinstance(caught.value, HornbeamError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError):
        open_store(url)


@given(
    scheme=st.sampled_from(
        [
            "lmdb",
            "memory",
            "redis",
            "rediss",
            "unix",
            "redis+sentinel",
            "rediss+cluster",
            "file",
            "\u00e9",
            "",
        ]
    ),
    separator=st.sampled_from(["://", ":///", ":", ""]),
    rest=st.text(alphabet=st.sampled_from("ab/:@?&=#%[],0129. \x00\u2100\u00b2\udc80-_")),
)
@settings(max_examples=300, deadline=None, database=None)
def test_no_text_breaks_the_parser(scheme, separator, rest):
    """Whatever the variable holds, it is a store or a ConfigError, nothing else."""
    try:
        config = StoreConfig.from_url(scheme + separator + rest)
    except ConfigError:
        return
    assert config.scheme == scheme
    assert isinstance(config.safe_url, str)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"redis://:{SECRET}@host:6379/0", id="redis"),
        pytest.param(f"redis://user:{SECRET}@host:6379/0", id="redis-user"),
        pytest.param(f"rediss://user:{SECRET}@[::1]:6379/0?timeout=2", id="rediss-ipv6"),
        pytest.param(f"redis://:a@{SECRET}@host", id="redis-password-with-at"),
        pytest.param(f"redis://host/0?password={SECRET}", id="query"),
        pytest.param(f"redis://host/0?db=1&password={SECRET}&x=1", id="query-among-others"),
        pytest.param(f"redis://host/0?sentinel_password={SECRET}", id="query-longer-name"),
        pytest.param(f"unix://user:{SECRET}@/run/redis.sock?db=1", id="unix"),
        pytest.param(f"unix:///run/redis.sock?password={SECRET}", id="unix-query"),
        pytest.param(f"redis+sentinel://u:{SECRET}@h1,h2:1/shop?sentinel_password={SECRET}", id="sentinel"),
        pytest.param(f"rediss+sentinel://h1,h2/shop/0?sentinel_username={SECRET}", id="sentinel-option"),
        pytest.param(f"redis+cluster://:{SECRET},{SECRET}@h1,[::1]:7000", id="cluster-password-with-comma"),
        pytest.param(f"redis+cluster://u:{SECRET}@h1,h2/0?db=0", id="cluster"),
    ],
)  # fmt: skip
def test_a_password_is_kept_but_never_shown(url):
    """Representations and `safe_url` leave it out, while the driver still gets it."""
    config = StoreConfig.from_url(url)
    assert SECRET in config.url
    for shown in (repr(config), str(config), f"{config}", config.safe_url):
        assert SECRET not in shown
    assert "***" in config.safe_url


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"redis://:{SECRET}@host:port/0", id="bad-port"),
        pytest.param(f"redis://:{SECRET}@:6379/0", id="no-host"),
        pytest.param(f"redis://:{SECRET}@host/zero", id="bad-database"),
        pytest.param(f"redis://:{SECRET}@host/0?timeout=x", id="bad-option"),
        pytest.param(f"redis://host/0?password={SECRET}&timeout=-1", id="bad-option-beside-query"),
        pytest.param(f"redis//:{SECRET}@host/0", id="no-scheme"),
        pytest.param(f"foo://user:{SECRET}@host/0", id="unknown-scheme"),
        pytest.param(f"redis://user:p/{SECRET}@host:6379/0", id="password-with-slash"),
        pytest.param(f"redis://user:12/{SECRET}@host:6379/0", id="password-with-slash-after-digits"),
        pytest.param(f"redis://user:p#{SECRET}@host:6379/0", id="password-with-hash"),
        pytest.param(f"redis://user:1?{SECRET}@host:6379/0", id="password-with-question-mark"),
        pytest.param(f"redis://user:[{SECRET}@host:6379/0", id="password-with-bracket"),
        pytest.param(f"lmdb://user:{SECRET}@host/srv/app", id="lmdb-with-credentials"),
        pytest.param(f"lmdb:///srv/app?password={SECRET}", id="lmdb-unknown-option"),
        pytest.param(f"redis?password={SECRET}", id="no-scheme-query"),
        pytest.param(f"redis+sentinel://u:{SECRET}@h1,u:{SECRET}@h2/shop", id="sentinel-two-logins"),
        pytest.param(f"redis+sentinel://u:{SECRET}@h1,h2", id="sentinel-no-service"),
        pytest.param(f"redis+cluster://u:a/{SECRET}@h1,h2", id="cluster-password-with-slash"),
        pytest.param(f"redis+cluster://u:[{SECRET}@h1,h2", id="cluster-password-with-bracket"),
        pytest.param(f"redis+cluster://u:{SECRET}@h1:x,h2", id="cluster-bad-port"),
    ],
)  # fmt: skip
def test_a_message_about_a_bad_url_shows_no_password(url, monkeypatch):
    """Error messages end up in logs, also those about a password that was not escaped."""
    monkeypatch.setenv("HORNBEAM_STORE", url)
    for parse in (lambda: StoreConfig.from_url(url), StoreConfig.from_env):
        with pytest.raises(ConfigError) as caught:
            parse()
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None, "a logged traceback would show the cause"


def test_the_default_is_a_directory_beside_the_app(tmp_path, monkeypatch):
    """Nothing set: `.hornbeam` in the working directory, which may fall back elsewhere."""
    monkeypatch.delenv("HORNBEAM_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    config = StoreConfig.from_env()
    assert config.scheme == "lmdb"
    assert config.path == tmp_path / ".hornbeam"
    assert config.fallback is True
    assert list(tmp_path.iterdir()) == [], "reading the configuration created something"


def test_an_empty_variable_counts_as_not_set(monkeypatch, tmp_path):
    """`HORNBEAM_STORE=` in an environment file means the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HORNBEAM_STORE", "")
    assert StoreConfig.from_env().path == tmp_path / ".hornbeam"


def test_the_variable_names_the_store(monkeypatch):
    """A URL in it is one that was asked for by name: no fallback."""
    monkeypatch.setenv("HORNBEAM_STORE", "lmdb:///srv/app?timeout=7")
    config = StoreConfig.from_env()
    assert (config.path, config.timeout, config.fallback) == (Path("/srv/app"), 7.0, False)


def test_an_environment_may_be_handed_in(monkeypatch):
    """A mapping takes the place of the process environment."""
    monkeypatch.setenv("HORNBEAM_STORE", "lmdb:///srv/process")
    assert StoreConfig.from_env({"HORNBEAM_STORE": "memory://"}).scheme == "memory"
    assert StoreConfig.from_env({}).fallback is True


@pytest.mark.parametrize("url", ["nonsense", "http://host", "lmdb://relative", "redis://h:x"])
def test_a_bad_variable_is_named_in_the_message(url, monkeypatch):
    """Whoever reads the log learns which setting to mend."""
    monkeypatch.setenv("HORNBEAM_STORE", url)
    with pytest.raises(ConfigError, match="HORNBEAM_STORE"):
        StoreConfig.from_env()


def test_a_deleted_working_directory_is_a_config_error(tmp_path, monkeypatch):
    """A deploy that removed the directory under a process gets a message, no bare OSError."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.delenv("HORNBEAM_STORE", raising=False)
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(HornbeamError, match="HORNBEAM_STORE"):
        StoreConfig.from_env()


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        pytest.param("lmdb:///x", {}, 1.0, id="default"),
        pytest.param("lmdb:///x?timeout=2", {}, 2.0, id="query-beats-default"),
        pytest.param("lmdb:///x", {"timeout": 3}, 3.0, id="keyword-beats-default"),
        pytest.param("lmdb:///x?timeout=2", {"timeout": 3}, 3.0, id="keyword-beats-query"),
        pytest.param("redis://h?timeout=2", {"timeout": 3}, 3.0, id="redis-keyword-beats-query"),
        pytest.param("memory://?timeout=2", {"timeout": "3"}, 3.0, id="keyword-as-text"),
    ],
)  # fmt: skip
def test_an_argument_beats_the_url_beats_the_default(url, options, expected):
    """One option has one value, from the most specific place that names it."""
    config = StoreConfig.from_url(url, **options)
    assert config.timeout == expected
    assert type(config.timeout) is float


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tiemout": 1}, id="unknown"),
        pytest.param({"path": "/srv"}, id="a-field-that-is-no-option"),
        pytest.param({"timeout": "soon"}, id="timeout-text"),
        pytest.param({"timeout": None}, id="timeout-none"),
        pytest.param({"timeout": []}, id="timeout-list"),
        pytest.param({"timeout": 0}, id="timeout-zero"),
        pytest.param({"timeout": float("nan")}, id="timeout-nan"),
        pytest.param({"state_size": 1000}, id="size-small"),
        pytest.param({"state_size": float("inf")}, id="size-infinite"),
        pytest.param({"cache_size": float("nan")}, id="size-nan"),
        pytest.param({"cache_size": 2**70}, id="size-beyond-64-bits"),
    ],
)  # fmt: skip
def test_a_bad_option_is_a_config_error(options):
    """It is refused when the store is made, not when it is first used."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        open_store("lmdb:///srv/app", **options)


def test_a_config_cannot_be_changed():
    """It is shared between stores, so it is frozen and takes keywords only."""
    config = StoreConfig.from_url("memory://")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 2.0
    with pytest.raises(TypeError):
        StoreConfig("memory", "memory://")


def test_making_a_store_touches_nothing(tmp_path):
    """The directory appears at first use, so that an arbiter may hold a store."""
    store = open_store(f"lmdb://{tmp_path}/store")
    assert list(tmp_path.iterdir()) == []
    store.close()
    assert list(tmp_path.iterdir()) == []
