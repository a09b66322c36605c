package register

import "context"

// What tests of this package may see of its inside.
var (
	CheckCnfValue = checkCnfValue
	FirstStage    = firstStage
	FinalStage    = finalStage
	WriteFile     = writeFile
	LastWords     = lastKeywardLine
)

const MaxDSNBytes = maxDSNBytes

func CheckLogin(l Login) error {
	_, err := l.config()
	return err
}

// A TestAgent is a runner.
type TestAgent struct {
	Mode                                  StartMode
	Program, Config, State, Socket, Units string
}

func (a TestAgent) runner() runner {
	return runner{mode: a.Mode, program: a.Program, config: a.Config, state: a.State, socket: a.Socket, units: a.Units}
}

func (a TestAgent) Running() int { return a.runner().running() }

func (a TestAgent) Start(ctx context.Context, changed bool) (bool, string, error) {
	return a.runner().start(ctx, changed)
}
