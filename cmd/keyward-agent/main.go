// Command keyward-agent is the connector on a database host: it holds the data
// keys of this host's databases in locked memory and serves them over a Unix
// socket. See its --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/cmd/internal/process"
	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// version is set by the release build.
var version = "development"

// Exit statuses, the same for all our programs.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// errUsage marks mistakes in the command line.
var errUsage = errors.New("wrong use")

// gcPercent trades CPU, of which an agent uses next to none, for memory.
const gcPercent = 30

// memoryGoal makes the collector work harder before the agent outgrows a
// database host's idea of a small daemon. Keys live outside the heap.
const memoryGoal = 20 << 20

func main() {
	if err := process.Harden(); err != nil {
		fmt.Fprintln(os.Stderr, "keyward-agent:", err)
		os.Exit(exitFailed)
	}
	debug.SetMemoryLimit(memoryGoal)
	debug.SetGCPercent(gcPercent)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := newCommand(stdout, stderr)
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(stderr, "keyward-agent:", err)
	if h := hint(err); h != "" {
		fmt.Fprintln(stderr, "keyward-agent: hint:", h)
	}
	if errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitFailed
}

// hint names the way on for classes of errors that have one.
func hint(err error) string {
	switch {
	case errors.Is(err, errUsage):
		return "keyward-agent --help"
	case errors.Is(err, dek.ErrAuth):
		return "the identity can't be opened with this host secret; enrol this host again: keyward plugin register --help"
	case errors.Is(err, dek.ErrExhausted):
		return "raise LimitMEMLOCK (systemd) or `ulimit -l`"
	default:
		return ""
	}
}

func newCommand(stdout, stderr io.Writer) *cobra.Command {
	var config string
	var check bool
	cmd := &cobra.Command{
		Use:   "keyward-agent --config FILE",
		Short: "Serve data keys to this host's databases",
		Long: `keyward-agent fetches the data keys of this host's databases from the key
service, holds them in locked memory and serves them over a Unix socket to
exactly those accounts that its configuration names. "keyward plugin register"
writes the configuration. SIGTERM ends it; databases keep what they hold.`,
		Example: `  keyward-agent --config /etc/keyward/agent.json
  keyward-agent --config /etc/keyward/agent.json --check`,
		Version:       version,
		Args:          noArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serve(cmd.Context(), config, check, stdout, stderr)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	cmd.Flags().StringVar(&config, "config", connector.DefaultAgentConfig, "configuration file")
	cmd.Flags().BoolVar(&check, "check", false, "check the configuration and end")
	return cmd
}

// noArgs is cobra.NoArgs with the exit status of wrong use.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%w: %s: unknown argument %q", errUsage, cmd.CommandPath(), args[0])
	}
	return nil
}

func serve(ctx context.Context, file string, check bool, stdout, stderr io.Writer) error {
	c, err := connector.ReadAgentConfig(file)
	if err != nil {
		return err
	}
	if check {
		_, err := fmt.Fprintln(stdout, "ok")
		return err
	}
	c.Logger = slog.New(slog.NewTextHandler(stderr, nil))
	agent, err := connector.NewAgent(c)
	if err != nil {
		return err
	}
	return agent.Run(ctx)
}
