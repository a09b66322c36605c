package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyward/keyward/connector"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"keyward":       func() { os.Exit(run(interruptible(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
		"keyward-agent": func() { os.Exit(agent(interruptible(), os.Args[1:])) },
	})
}

func interruptible() context.Context {
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) //nolint:govet // for the life of the process
	return ctx
}

// agent is a real agent with the command line of keyward-agent.
func agent(ctx context.Context, args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "keyward-agent:", err)
		return 1
	}
	if len(args) != 2 || args[0] != "--config" {
		return 2
	}
	cfg, err := connector.ReadAgentConfig(args[1])
	if err != nil {
		return fail(err)
	}
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	a, err := connector.NewAgent(cfg)
	if err != nil {
		return fail(err)
	}
	if err := a.Run(ctx); err != nil {
		return fail(err)
	}
	return 0
}

// scriptCommands are what scripts can do besides running programs.
func scriptCommands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"exits":   cmdExits,
		"service": cmdService,
		"mode":    cmdMode,
		"mariadb": cmdMariaDB,
		"endpid":  cmdEndpid,
	}
}

// condition knows [mariadb]: a server is installed, or must be.
func condition(name string) (bool, error) {
	if name != "mariadb" {
		return false, fmt.Errorf("unknown condition %q", name)
	}
	_, err := exec.LookPath("mariadbd")
	return err == nil || os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1", nil
}

// cmdExits runs a program and compares its exit status: exits 2 keyward vault.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	if err != nil || neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS program args...")
	}
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// cmdService starts a key service and writes the first administrator's token
// file: service admin.token. Its address is $ENDPOINT from then on.
func cmdService(ts *testscript.TestScript, neg bool, args []string) {
	t, ok := ts.Value(scriptT{}).(*testing.T)
	if neg || len(args) != 1 || !ok {
		ts.Fatalf("usage: service FILE")
	}
	s := startService(t)
	ts.Setenv("ENDPOINT", s.endpoint)
	ts.Check(s.admin.Save(ts.MkAbs(args[0])))
}

// cmdMode compares a file's permissions: mode 600 olga.token.
func cmdMode(ts *testscript.TestScript, neg bool, args []string) {
	st, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", st.Mode().Perm()); (got == args[0]) == neg {
		ts.Fatalf("%s: mode %s, want %s", args[1], got, args[0])
	}
}

// scriptT is the key of the *testing.T in a script's values.
type scriptT struct{}

func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Files: []string{f}, Cmds: scriptCommands(), RequireExplicitExec: true,
				Condition:     condition,
				UpdateScripts: os.Getenv("KEYWARD_UPDATE_SCRIPTS") == "1",
				Setup: func(e *testscript.Env) error {
					e.Values[scriptT{}] = t
					e.Values[databases{}] = map[string]*database{}
					e.Defer(func() { endSpawned(filepath.Join(e.WorkDir, "a/state/agent.pid")) })
					e.Setenv("GORACE", "atexit_sleep_ms=0") // with -race each program would end a second later
					e.Setenv("KEYWARD_HOME", filepath.Join(e.WorkDir, "home"))
					return nil
				},
			})
		})
	}
}
