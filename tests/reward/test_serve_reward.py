"""`serve-reward` as a process: it prints its address, serves many clients, may be killed, and ends on Ctrl-C."""

import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from comfyui_pcpo.reward import RewardSettings, load_reward
from comfyui_pcpo.reward.service.remote import Remote
from comfyui_pcpo.reward.service.wire import Peer, ServerUnavailable
from trainer.cli.main import main

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef-test"
SERVE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
from trainer.cli.main import main
sys.exit(main(["serve-reward", "colorfulness", "--port", "0"]))
"""


@pytest.fixture
def served(script):
    """A server's process and its address; killed at the end if it still runs."""
    process = script(SERVE, PCPO_REWARD_TOKEN=TOKEN)
    line = process.stdout.readline()
    address = re.match(r"colorfulness on (http://127\.0\.0\.1:\d+)", line)
    assert address, line + process.stderr.read()
    yield process, address[1]
    process.kill()
    process.communicate(timeout=30)


def client(url, **peer):
    return Remote(RewardSettings(images_at_once=10), Peer(url, TOKEN, **({"pause": 0.05, "timeout": 20.0} | peer)))


def images(seed, count):
    return torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(seed))


def test_eight_clients_score_500_images_and_a_killed_server_is_named(served):
    """8 clients x 63 images; a server that is killed in the middle ends the clients with its address, not with NaN."""
    process, url = served
    local = load_reward("colorfulness")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: client(url).score(images(n, 63), [""] * 63), range(8)))
    for n, scores in enumerate(results):
        torch.testing.assert_close(scores, local.score(images(n, 63), [""] * 63))
    process.kill()
    process.wait()
    with pytest.raises(ServerUnavailable, match=f"{url} does not answer"):
        client(url, patience=0.2).score(images(0, 63), [""] * 63)


def test_a_server_on_all_addresses_says_so_and_tells_one_that_clients_reach(script):
    process = script(SERVE.replace('"0"]', '"0", "--host", "0.0.0.0"]'), PCPO_REWARD_TOKEN=TOKEN)
    try:
        said = ""
        while "PCPO_REWARD_URL" not in said:
            line = process.stdout.readline()
            assert line, said + process.stderr.read()
            said += line
        url = re.search(r"PCPO_REWARD_URL=(http://\S+)", said)
        assert "0.0.0.0" not in said and "all addresses" in said and "unencrypted" in said
        assert client(url[1]).is_healthy()
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to every process of a console")
def test_ctrl_c_ends_the_server_cleanly(served):
    process, url = served
    assert client(url).is_healthy()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "stopped" and "Traceback" not in errors
    assert not client(url, patience=0, timeout=1.0).is_healthy()


def test_a_server_without_a_token_says_so(monkeypatch, capsys):
    monkeypatch.delenv("PCPO_REWARD_TOKEN", raising=False)
    assert main(["serve-reward", "colorfulness", "--port", "0"]) == 2
    assert "PCPO_REWARD_TOKEN has 0 characters" in capsys.readouterr().err


def test_what_cannot_be_served_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PCPO_REWARD_TOKEN", TOKEN)
    assert main(["serve-reward", "hpsv2.1", "--folder", str(tmp_path)]) == 2
    assert "HPS_v2.1_compressed.pt does not exist" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve-reward", "colorfulness", "--port", str(port)]) == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["serve-reward", "colorfulness", "--port", "70000"]) == 2
    assert "Choose another --host or --port" in capsys.readouterr().err


def test_a_run_on_a_served_reward_trains_as_on_a_local_one(served, make_config, monkeypatch):
    from running import start_run

    _, url = served
    monkeypatch.setenv("PCPO_REWARD_URL", url)
    monkeypatch.setenv("PCPO_REWARD_TOKEN", TOKEN)
    config = make_config(reward={"held_out": ["remote"]}, run={"updates": 1})
    folder, updates = start_run(config)
    list(updates)
    (record,) = folder.records()
    assert record["held_out"]["remote"] == pytest.approx(record["rewards"]["colorfulness"], rel=1e-5)
