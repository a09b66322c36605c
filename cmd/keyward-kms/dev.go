package main

import (
	"context"
	"errors"
	"fmt"
	"net"
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
		Args:    noArgs,
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
	if host, _, err := net.SplitHostPort(listen); err == nil && !net.ParseIP(host).IsLoopback() {
		return fmt.Errorf("%w: --listen %s is not a loopback address: dev is for trying out", errUsage, listen)
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	c.fill()
	if err := makeDir("--dir", dir); err != nil {
		return err
	}
	log := newLogger(s.err)
	tokenFile := filepath.Join(dir, "admin.token")
	done, err := exists(filepath.Join(c.StateDir, devMark), tokenFile) // init writes the latter last
	if err != nil {
		return err
	}
	if !done {
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
	}
	return serve(ctx, c, log, func() error {
		_, err := fmt.Fprintf(s.out, "serving on %s\nfor trying out only: the keys are files in %s\nenrol: keyward enrol --token-file %s\n",
			listen, dir, tokenFile)
		return err
	})
}

// devMark says that the directory holds a whole installation, also after the
// token file was used and removed.
const devMark = "initialised"

// exists reports whether one of the files is there.
func exists(names ...string) (bool, error) {
	for _, n := range names {
		if _, err := os.Stat(n); err == nil {
			return true, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}
