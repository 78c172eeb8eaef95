"""The old command: `python predict.py --model_path DIR` answers the well-known example. See `python
-m finetune.predict`.
"""

import sys

from finetune.evaluation.predict import build_parser, main
from finetune.launched import single_start

EXAMPLE = (
    '你现在是一个信息抽取模型，请你帮我抽取出关系内容为"性能故障", "部件故障", '
    '"组成"和 "检测工具"的相关三元组，'
    '三元组内部用"_"连接，三元组之间用\\n分割。'
    "文本：故障现象：冷车启动困难，发动机抖动，用诊断仪检测发现火花塞积碳。"
)

if __name__ == "__main__":
    flags = single_start(None)
    given = {flag.split("=")[0] for flag in flags}
    flags += [] if "--model_path" in given else ["--model_path", "output_dir/"]
    known, _ = build_parser().parse_known_args(flags)
    if not (known.prompt or known.file or known.interactive):
        flags += ["--prompt", EXAMPLE]
        flags += [] if "--do_sample" in given else ["--do_sample", "True"]  # as the old program did
        print(f"prompt: {EXAMPLE}")
    sys.exit(main(flags))
