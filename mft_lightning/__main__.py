from mft_lightning.cli import main

raise SystemExit(main())
