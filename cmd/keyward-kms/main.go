// Command keyward-kms is Keyward's key service: it keeps master keys in a
// PKCS#11 token and answers databases over gRPC. See its --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/cmd/internal/process"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
)

// version is set by the release build.
var version = "development"

// childArgument makes this program the supervised process that holds the
// PKCS#11 module. It is not for people.
const childArgument = "token-child"

func main() {
	if len(os.Args) == 2 && os.Args[1] == childArgument {
		os.Exit(hsm.RunChild(context.Background()))
	}
	if err := process.Harden(); err != nil {
		fmt.Fprintln(os.Stderr, "keyward-kms:", err)
		os.Exit(exitFailed)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit statuses, the same for all our programs.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// errUsage marks mistakes in the command line.
var errUsage = errors.New("wrong use")

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot(&streams{stdin, stdout, stderr})
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(stderr, "keyward-kms:", err)
	if h := hint(err); h != "" {
		fmt.Fprintln(stderr, "keyward-kms: hint:", h)
	}
	if errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitFailed
}

type streams struct {
	in  io.Reader
	out io.Writer // results alone
	err io.Writer // everything for people
}

// A remedy is an error whose way on is its own, not that of its class.
type remedy struct {
	error
	way string
}

func (r remedy) Unwrap() error { return r.error }

// hint names the way on for errors that have one.
func hint(err error) string {
	var r remedy
	switch {
	case errors.As(err, &r):
		return r.way
	case errors.Is(err, errUsage):
		return "keyward-kms --help"
	case errors.Is(err, dek.ErrCorrupt):
		return "nothing was changed; keep the directory and restore from a backup: keyward-kms restore --help"
	case errors.Is(err, dek.ErrExhausted):
		return "free space on the file systems of state_dir and audit_dir, or raise LimitMEMLOCK"
	default:
		return ""
	}
}

func newRoot(s *streams) *cobra.Command {
	root := &cobra.Command{
		Use:           "keyward-kms",
		Short:         "The key service: master keys in an HSM, wrapped keys for databases",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Example: `  keyward-kms dev --dir /tmp/keyward            # try it, nothing to install
  keyward-kms init --config /etc/keyward/kms.json --admin-token-file admin.token
  keyward-kms serve --config /etc/keyward/kms.json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fmt.Errorf("%w: name a command", errUsage)
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	root.AddCommand(newInit(s), newServe(s), newDev(s), newBackup(s), newRestore(s), newCheck(s))
	return root
}

// noArgs is cobra.NoArgs with the exit status of wrong use.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%w: %s: unknown argument %q", errUsage, cmd.CommandPath(), args[0])
	}
	return nil
}

// needFlags is the PreRunE of commands whose string flags must be given.
func needFlags(names ...string) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		var errs []error
		for _, n := range names {
			if f := cmd.Flags().Lookup(n); f == nil || f.Value.String() == "" {
				errs = append(errs, fmt.Errorf("%w: --%s is missing", errUsage, n))
			}
		}
		return errors.Join(errs...)
	}
}

func newCheck(s *streams) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:     "check",
		Short:   "Check a configuration file and touch nothing",
		Example: "  keyward-kms check --config /etc/keyward/kms.json",
		Args:    noArgs,
		PreRunE: needFlags("config"),
		RunE: func(*cobra.Command, []string) error {
			if _, err := loadConfig(config); err != nil {
				return err
			}
			fmt.Fprintln(s.out, "ok")
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file")
	return cmd
}
