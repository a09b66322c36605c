package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// The load of the OLTP benchmarks: tables bigger than the buffer pool, reads
// from the page cache (no O_DIRECT), so that the cipher does not hide behind
// the disk.
const (
	oltpTables  = 4
	oltpThreads = 4
	oltpRows    = 200_000
	oltpSpan    = 15 * time.Second
)

// A database is one server of the comparison.
type database struct {
	name   string
	server *mariadbtest.Server
}

// oltp compares the server's CPU per transaction under sysbench: our plugin,
// file_key_management with AES-CTR, and no encryption. All three servers stay
// up; two are idle while the third works.
func oltp(ctx context.Context, b *bench) (results []Result, err error) {
	if _, err := need("sysbench", "sysbench"); err != nil {
		return nil, err
	}
	agent, err := startScriptedAgent(filepath.Join(b.dir, "agent.sock"))
	if err != nil {
		return nil, err
	}
	defer agent.Stop()
	dbs, err := b.startDatabases(ctx, agent.Path())
	defer func() {
		for _, d := range dbs {
			err = errors.Join(err, d.server.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err != nil {
		return nil, err
	}
	for _, load := range []string{"oltp_write_only", "oltp_read_write"} {
		rs, err := b.oltpLoad(ctx, dbs, load)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", load, err)
		}
		results = append(results, rs...)
	}
	return results, nil
}

// oltpLoad measures one load on ours, the rival and the server in clear.
func (b *bench) oltpLoad(ctx context.Context, dbs []*database, load string) ([]Result, error) {
	rounds := *b
	rounds.rounds = max(b.rounds, b.pick(4, 1))
	var variants []variant
	for _, d := range dbs {
		variants = append(variants, func(ctx context.Context) (sample, error) { return b.transactions(ctx, d, load) })
	}
	got, err := rounds.interleave(ctx, variants...)
	if err != nil {
		return nil, err
	}
	const cpu, rate = 0, 1
	ours, ctr, plain := got[0], got[1], got[2]
	name := "mariadb/" + load
	q := func(suffix, against, unit, goal string, less bool) question {
		return question{name: name + suffix, against: against, unit: unit, goal: goal, lessIsBetter: less}
	}
	const unit = "us server CPU/transaction"
	return []Result{
		q("", "file_key_management AES-CTR", unit, "<= 1.02", true).compare(ours[cpu], ctr[cpu]),
		q("/plain", "no encryption", unit, "", true).compare(ours[cpu], plain[cpu]),
		q("/file_key_plain", "no encryption; ours is file_key_management here", unit, "", true).compare(ctr[cpu], plain[cpu]),
		q("/tps", "file_key_management AES-CTR", "transactions/s", "", false).compare(ours[rate], ctr[rate]),
		q("/tps/plain", "no encryption", "transactions/s", "", false).compare(ours[rate], plain[rate]),
	}, nil
}

// transactions runs a load once: server CPU in us and transactions a second.
func (b *bench) transactions(ctx context.Context, d *database, load string) (sample, error) {
	before, err := cpuTime(d.server.PID())
	if err != nil {
		return nil, err
	}
	length := []string{"--time=" + strconv.Itoa(int(oltpSpan.Seconds())), "run"}
	if b.short {
		length = []string{"--time=0", "--events=1000", "run"}
	}
	out, err := b.sysbench(ctx, d, load, length...)
	if err != nil {
		return nil, err
	}
	after, err := cpuTime(d.server.PID())
	if err != nil {
		return nil, err
	}
	m := regexp.MustCompile(`transactions:\s+(\d+)\s+\(([0-9.]+) per sec`).FindStringSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("sysbench printed no transactions: %s", out)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("sysbench counted %q transactions", m[1])
	}
	rate, err := strconv.ParseFloat(m[2], 64)
	return sample{float64((after - before).Microseconds()) / n, rate}, err
}

func (b *bench) sysbench(ctx context.Context, d *database, load string, args ...string) (string, error) {
	all := append([]string{load, "--db-driver=mysql", "--mysql-user=root", "--mysql-socket=" + d.server.Socket(),
		"--mysql-db=sbtest", "--threads=" + strconv.Itoa(oltpThreads), "--rand-type=uniform",
		"--tables=" + strconv.Itoa(oltpTables), "--table-size=" + strconv.Itoa(b.pick(oltpRows, 200))}, args...)
	out, err := exec.CommandContext(ctx, "sysbench", all...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("sysbench on %s: %w: %s; its server: %s", d.name, err, out, lastLines(d.server.ErrorLog(), 5))
	}
	return string(out), nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// startScriptedAgent serves the two keys that a server needs. The agent is on
// no path of a transaction, so a scripted one does.
func startScriptedAgent(path string) (*mariadbtest.Agent, error) {
	a := mariadbtest.NewAgent(path)
	a.Add(1, "bench/system")
	a.Add(2, "bench/temp")
	return a, a.Start()
}

// startDatabases makes three servers with the same data and, where they
// encrypt, the same settings. Those that started are returned with an error.
func (b *bench) startDatabases(ctx context.Context, agentSocket string) ([]*database, error) {
	lib, err := mariadbtest.BuildPlugin(ctx, filepath.Join(b.root, "plugins", "mariadb"), "all")
	if err != nil {
		return nil, err
	}
	keys := filepath.Join(b.dir, "keys")
	// 256-bit keys, as ours are.
	text := "1;" + strings.Repeat("0123456789abcdef", 4) + "\n2;" + strings.Repeat("fedcba9876543210", 4) + "\n"
	if err := os.WriteFile(keys, []byte(text), 0o600); err != nil {
		return nil, err
	}
	// Plugin and socket come first in the list, settings after.
	encrypt := mariadbtest.EncryptionArgs(agentSocket)
	settings := slices.DeleteFunc(slices.Clone(encrypt), func(a string) bool {
		return strings.HasPrefix(a, "--plugin-load-add") || strings.HasPrefix(a, "--keyward")
	})
	template := filepath.Join(b.dir, "template")
	if err := mariadbtest.InstallDB(ctx, template); err != nil {
		return nil, err
	}
	var dbs []*database
	for _, v := range []struct {
		name string
		args []string
	}{
		{"keyward", encrypt},
		{"file-key", append([]string{"--plugin-load-add=file_key_management", "--file-key-management-filename=" + keys,
			"--file-key-management-encryption-algorithm=AES_CTR"}, settings...)},
		{"plain", nil},
	} {
		d, err := b.startDatabase(ctx, v.name, mariadbtest.Config{Template: template, Plugins: []string{lib}, Args: v.args})
		if d != nil {
			dbs = append(dbs, d)
		}
		if err != nil {
			return dbs, fmt.Errorf("server %s: %w", v.name, err)
		}
	}
	return dbs, nil
}

func (b *bench) startDatabase(ctx context.Context, name string, c mariadbtest.Config) (*database, error) {
	c.Dir = filepath.Join(b.dir, name)
	c.Args = append([]string{"--innodb-buffer-pool-size=64M", "--innodb-log-file-size=96M",
		"--innodb-flush-method=fsync", "--innodb-flush-log-at-trx-commit=2"}, c.Args...)
	s, err := mariadbtest.Start(ctx, c)
	if s == nil {
		return nil, err
	}
	d := &database{name, s}
	if err != nil {
		return d, fmt.Errorf("%w: %s", err, lastLines(s.ErrorLog(), 5))
	}
	if _, err := s.DB().ExecContext(ctx, "CREATE DATABASE sbtest"); err != nil {
		return d, err
	}
	_, err = b.sysbench(ctx, d, "oltp_read_write", "prepare")
	return d, err
}
