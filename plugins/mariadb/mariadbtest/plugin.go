package mariadbtest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// PluginName is the file name of the MariaDB plugin.
const PluginName = "keyward_key_management.so"

// BuildPlugin runs make target ("all", "asan", "tsan") in dir, the folder
// plugins/mariadb of the source tree, and returns the path of the plugin that
// the target makes.
func BuildPlugin(ctx context.Context, dir, target string) (string, error) {
	// packages are tested at the same time, and make knows nothing of another make
	lock, err := os.Open(dir)
	if err != nil {
		return "", fmt.Errorf("mariadbtest: %w", err)
	}
	defer lock.Close() // ends the lock
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("mariadbtest: lock %s: %w", dir, err)
	}
	out, err := exec.CommandContext(ctx, "make", "-s", "-C", dir, target).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mariadbtest: make %s: %w: %s", target, err, tail(out))
	}
	if target == "asan" {
		return filepath.Join(dir, "build", "asan", PluginName), nil
	}
	return filepath.Join(dir, "build", PluginName), nil
}

// EncryptionArgs are the arguments of mariadbd for a server that writes
// nothing in clear, with the keys of the agent at socket.
func EncryptionArgs(socket string) []string {
	return []string{
		"--plugin-load-add=keyward_key_management",
		"--keyward-socket=" + socket,
		"--innodb-encrypt-tables=FORCE",
		"--innodb-encrypt-log=ON",
		"--innodb-encrypt-temporary-tables=ON",
		"--innodb-encryption-threads=2",
		"--innodb-encryption-rotate-key-age=1",
		"--encrypt-tmp-files=ON",
		"--encrypt-tmp-disk-tables=ON",
		"--encrypt-binlog=ON",
		"--aria-encrypt-tables=ON",
	}
}

// PageCrypt is one interleaved comparison of 16 KiB pages through the plugin's
// crypt functions and through the server's own (test/pagecrypt.c).
type PageCrypt struct {
	Cipher    string        // "ctr", "cbc"
	Direction string        // "encrypt", "decrypt"
	Ours      time.Duration // per page
	Builtin   time.Duration
}

// ComparePageCrypt runs build/pagecrypt of dir, the folder plugins/mariadb,
// and returns rounds values for each cipher and direction, in the order of the
// runs.
func ComparePageCrypt(ctx context.Context, dir string, rounds, pages int) ([]PageCrypt, error) {
	if _, err := BuildPlugin(ctx, dir, "all"); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "build", "pagecrypt"), strconv.Itoa(rounds), strconv.Itoa(pages)).Output()
	if err != nil {
		return nil, fmt.Errorf("mariadbtest: pagecrypt: %w", err)
	}
	var all []PageCrypt
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		var p PageCrypt
		if _, err := fmt.Sscan(lines.Text(), &p.Cipher, &p.Direction, &p.Ours, &p.Builtin); err != nil {
			return nil, fmt.Errorf("mariadbtest: pagecrypt: %q: %w", lines.Text(), err)
		}
		all = append(all, p)
	}
	return all, nil
}
