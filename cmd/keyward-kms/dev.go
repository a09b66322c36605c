package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// devListen is where `dev` listens unless told otherwise.
const devListen = "127.0.0.1:7443"

func newDev(s *streams) *cobra.Command {
	var dir, listen string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Try it: a software token, everything in one directory, nothing to install",
		Long: `dev makes an installation with a software token in a directory, unless there is
one, and serves it on a loopback address until SIGTERM. The keys are files: it is
for trying out and for tests, never for data you want to keep.`,
		Example: "  keyward-kms dev --dir ~/keyward-dev\n  keyward enrol --token-file ~/keyward-dev/admin.token",
		Args:    cobra.NoArgs,
		PreRunE: needFlags("dir"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return dev(cmd.Context(), s, dir, listen)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory of the installation; made if it is not there")
	cmd.Flags().StringVar(&listen, "listen", devListen, "loopback host:port")
	return cmd
}

func dev(ctx context.Context, s *streams, dir, listen string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	strict := true
	c := &Config{StateDir: filepath.Join(dir, "state"), SoftwareToken: filepath.Join(dir, "token"),
		Listen: []string{listen}, BackupDir: filepath.Join(dir, "backup"), Strict: &strict}
	if err := c.check(); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	c.fill()
	if err := makeDir("--dir", dir); err != nil {
		return err
	}
	log := newLogger(s.err)
	tokenFile := filepath.Join(dir, "admin.token")
	_, err = os.Stat(filepath.Join(c.StateDir, devMark))
	switch {
	case errors.Is(err, os.ErrNotExist):
		report, err := initialise(ctx, c, defaultAdministrator, tokenFile, log)
		if err != nil {
			return err
		}
		for _, line := range report {
			fmt.Fprintln(s.err, line)
		}
		if err := writeJSON(filepath.Join(c.StateDir, devMark), true); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	return serve(ctx, c, log, func() error {
		_, err := fmt.Fprintf(s.out, "serving on %s\nfor trying out only: the keys are files in %s\nenrol: keyward enrol --token-file %s\n",
			listen, dir, tokenFile)
		return err
	})
}

// devMark says that the directory holds a whole installation.
const devMark = "initialised"
