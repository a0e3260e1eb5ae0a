"""One conversation, three handlers, one line of TOML: the model here, a second `homeroom serve`, llama.cpp's server.

All three read the same .gguf file. The first two must say the same; llama.cpp rounds activations to 8 bits and may part.
Needs: pip install xllamacpp. Run: python swap.py --homeroom target/release/homeroom --gguf MODEL.gguf
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from serving import check, serve, verdict

CONFIG = """\
[handlers.here]
kind = "local"
model = "{gguf}"

[handlers.there]
kind = "openai"
base_url = "{there}"
model = "{model}"

[handlers.llama-cpp]
kind = "openai"
base_url = "{llama}/v1"
model = "any"

[routes.tutor]
handlers = ["here"]
"""
LINES = ["What is the capital of France?", "And of Italy?", "/clear", "Say hello."]


def llama_cpp(gguf: str):
    """llama.cpp's own server, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.port = 2048, 1, 0
    params.cpuparams.n_threads = 2
    return xllamacpp.Server(params)


def talk(homeroom: str, config: Path) -> list[str]:
    command = [homeroom, "chat", "--handler", "tutor", "--config", config, "--temperature", "0", "--max-tokens", "24"]
    command += ["--system", "You are a helpful assistant."]
    done = subprocess.run(command, input="\n".join(LINES), capture_output=True, text=True)
    check("  it answers", done.returncode == 0, done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--gguf", required=True, help="a model file that llama.cpp and Homeroom both read")
    arguments = parser.parse_args()
    gguf = os.path.abspath(arguments.gguf)
    llama = llama_cpp(gguf)
    answers = {}
    with serve(arguments.homeroom, "--model-dir", gguf) as (there, [model]), tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "handlers.toml"
        text = CONFIG.format(gguf=gguf, there=there, model=model, llama=llama.listening_address)
        for handler in ("here", "there", "llama-cpp"):
            print(f'handlers = ["{handler}"]')
            config.write_text(text.replace('handlers = ["here"]', f'handlers = ["{handler}"]'))
            answers[handler] = talk(arguments.homeroom, config)
            print("    " + answers[handler].replace("\n", "\n    ").rstrip())
    check("here and there say the same", answers["here"] == answers["there"])
    same = len(os.path.commonprefix([answers["here"], answers["llama-cpp"]]))
    print(f"       llama.cpp says the same for {same} of {len(answers['here'])} characters")
    check("llama.cpp says something", len(answers["llama-cpp"]) > 20, answers["llama-cpp"])
    verdict()


if __name__ == "__main__":
    main()
