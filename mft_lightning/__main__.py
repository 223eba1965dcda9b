from mft_lightning import ranks
from mft_lightning.cli import main

code = main()
ranks.end_launched(code)
raise SystemExit(code)
