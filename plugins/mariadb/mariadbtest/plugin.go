package mariadbtest

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
)

// PluginName is the file name of the MariaDB plugin.
const PluginName = "keyward_key_management.so"

// BuildPlugin runs make target ("all", "asan") in dir, the folder
// plugins/mariadb of the source tree, and returns the path of the plugin that
// the target makes.
func BuildPlugin(ctx context.Context, dir, target string) (string, error) {
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
