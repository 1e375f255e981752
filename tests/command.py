"""The command `sparse-coding`, in this interpreter's own environment."""
import sys

COMMAND = [sys.executable, "-c", "import sys; from sparse_coding.tools.command_line import main; sys.exit(main())"]
