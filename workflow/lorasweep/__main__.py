from lorasweep.cli.main import main

main()
