"""A ComfyUI server for tests: a process on loopback with a temporary base directory that contains this pack."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import comfy_host

WORKFLOWS = sorted((comfy_host.PACK / "workflows").glob("*.json"))
UNATTENDED = [path for path in WORKFLOWS if path.stem != "7 your taste"]  # without questions to a person


class Server:
    def __init__(self):
        self.base = Path(tempfile.mkdtemp(prefix="pcpo-server-"))
        for name in ("custom_nodes", "user", "models", "input"):
            (self.base / name).mkdir()
        (self.base / "custom_nodes" / "comfyui_pcpo").symlink_to(comfy_host.PACK)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (self.base / "server.log").open("w")
        command = [sys.executable, "main.py", "--cpu", "--base-directory", str(self.base), "--port", str(self.port),
                   "--preview-method", "latent2rgb"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.process = subprocess.Popen(
            command, cwd=comfy_host.COMFYUI, stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, seconds: float = 180) -> None:
        end = time.time() + seconds
        while time.time() < end and self.process.poll() is None:
            try:
                if self.get("/object_info/PCPOTrainLoRA"):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError("the server did not start:\n" + (self.base / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def post(self, path: str, body) -> tuple[int, dict]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def run(self, prompt: dict, seconds: float = 600, while_running=lambda: None) -> dict:
        """Queue an API graph and wait, -> its history entry."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        end = time.time() + seconds
        while time.time() < end:
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            while_running()
            time.sleep(0.3)
        raise TimeoutError(f"not done after {seconds} seconds")


def seconds(entry: dict) -> float:
    """Execution time of a prompt, from the server's history."""
    times = [message[1]["timestamp"] for message in entry["status"]["messages"]]
    return (times[-1] - times[0]) / 1000


def api_graph(workflow: dict, info: dict) -> dict:
    """The API graph of a workflow file: node id -> class and inputs, without muted nodes and notes."""
    graph = {}
    for key, (node, sources, promoted) in expanded(workflow).items():
        if node["mode"] != 0 or node["type"] not in info:
            continue
        spec = info[node["type"]]["input"]
        widgets, inputs = list(node.get("widgets_values") or []), {}
        for name, given in {**spec.get("required", {}), **spec.get("optional", {})}.items():
            kind, options = given[0], given[1] if len(given) > 1 else {}
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                value = widgets.pop(0) if widgets else None
                if options.get("control_after_generate") or (
                    name in ("seed", "noise_seed") and widgets[:1] == ["fixed"]
                ):
                    widgets.pop(0)
                if value is not None:
                    inputs[name] = promoted.get(name, value)
            if name in sources:
                inputs[name] = list(sources[name])
        graph[key] = {"class_type": node["type"], "inputs": inputs}
    return graph


Sources = dict[str, tuple[str, int]]  # of linked inputs: node and output


def expanded(workflow: dict) -> dict[str, tuple[dict, Sources, dict]]:
    """Nodes by id, inner ones as "outer:inner": the node, its sources, and the values that outer widgets give."""
    subgraphs = {subgraph["id"]: subgraph for subgraph in workflow.get("definitions", {}).get("subgraphs", ())}
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    nodes, outputs = {}, {}
    for node in workflow["nodes"]:
        sources = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
        if node["type"] not in subgraphs:
            nodes[str(node["id"])] = node, sources, {}
            continue
        inner = subgraphs[node["type"]]
        values = dict(zip([i["name"] for i in node["inputs"] if "widget" in i], node["widgets_values"], strict=True))
        for link in inner["links"]:
            if link["target_id"] == inner["outputNode"]["id"]:
                outputs[str(node["id"]), link["target_slot"]] = f"{node['id']}:{link['origin_id']}", link["origin_slot"]
        nodes |= {
            f"{node['id']}:{n['id']}": (n, *inside(n, inner, (node["id"], sources, values))) for n in inner["nodes"]
        }
    return {
        key: (node, {name: outputs.get(source, source) for name, source in sources.items()}, promoted)
        for key, (node, sources, promoted) in nodes.items()
    }


def inside(node: dict, subgraph: dict, outer: tuple[int, Sources, dict]) -> tuple[Sources, dict]:
    """Sources of a node in a subgraph, and the values of its widgets that are inputs of the subgraph."""
    key, outer_sources, values = outer
    links, sources, promoted = {link["id"]: link for link in subgraph["links"]}, {}, {}
    for entry in node["inputs"]:
        link = links.get(entry.get("link"))
        if link and link["origin_id"] != subgraph["inputNode"]["id"]:
            sources[entry["name"]] = f"{key}:{link['origin_id']}", link["origin_slot"]
        elif link:
            name = subgraph["inputs"][link["origin_slot"]]["name"]
            if name in values:
                promoted[entry["name"]] = values[name]
            elif name in outer_sources:
                sources[entry["name"]] = outer_sources[name]
    return sources, promoted
