"""The command `sparse-coding`, in this interpreter's own environment."""
import sys

COMMAND = [sys.executable, "-c", "import sys; from sparse_coding.reproduce import main; sys.exit(main())"]
