package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// all lists what is measured, the quick ones first.
func all() []benchmark {
	return []benchmark{
		{[]string{"cache/hit"}, cacheHit},
		{[]string{"mariadb/page_crypt", "mariadb/page_crypt_cbc"}, pageCrypt},
		{[]string{"unwrap/grpc/64", "unwrap/grpc/64/cpu", "unwrap/batch", "unwrap/same", "kms/rss"}, unwraps},
		{[]string{"socket/get"}, socketGet},
		{[]string{"agent/rss"}, agentRSS},
		{[]string{"kms/start", "kms/start/after_100k"}, startSoftware},
		{[]string{"kms/start/softhsm", "kms/start/softhsm/after_100k"}, startSoftHSM},
		{[]string{"mariadb/oltp_write_only", "mariadb/oltp_read_write"}, oltp},
	}
}

// helpers are the programs that this one runs as processes of their own, by
// first argument.
func helpers() map[string]func(args []string, stdout io.Writer) error {
	return map[string]func([]string, io.Writer) error{
		"helper-raw-decrypt": rawDecrypt,
		"helper-echo":        echoServer,
	}
}

// helper is this program as one of its helpers.
func helper(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "/proc/self/exe", args...)
}

// errMissing is wrapped where something of Debian is not installed.
var errMissing = errors.New("not installed")

func need(program, pkg string) (string, error) {
	p, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%s: %w: apt install %s", program, errMissing, pkg)
	}
	return p, nil
}

// sourceRoot is the folder of go.mod.
func sourceRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	mod := strings.TrimSpace(string(out))
	if err != nil || mod == "" || mod == os.DevNull {
		return "", fmt.Errorf("run this inside the source tree (go env GOMOD: %q, %w)", mod, err)
	}
	return filepath.Dir(mod), nil
}

// span is the length of one measurement.
func (b *bench) span(d time.Duration) time.Duration {
	if b.short {
		return 200 * time.Millisecond
	}
	return d
}

// pick returns n, or few in short mode.
func (b *bench) pick(n, few int) int {
	if b.short {
		return few
	}
	return n
}
