// Package process keeps secrets of a running program out of files it does not
// write itself: core dumps and the memory of a debugger.
package process

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Harden forbids core dumps of this process and its children and makes its
// memory unreadable to other processes of the same user (prctl(2)
// PR_SET_DUMPABLE, setrlimit(2) RLIMIT_CORE). Call it first thing in main.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid dumps: %w", err)
	}
	unix.Umask(0o077)
	return nil
}
