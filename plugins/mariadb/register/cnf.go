package register

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/keyward/keyward/dek"
)

// cnfName sorts behind the distribution's own files, so that it has the last
// word.
const cnfName = "90-keyward.cnf"

// cnfHead opens the file in both of its stages.
const cnfHead = `# Written by: keyward plugin register mariadb
# Running the command again rewrites this file; put changes of your own into a
# file that sorts behind it.
[mariadbd]
`

// encrypted is the configuration of a server whose every part is encrypted:
// what plugins/mariadb/README.md explains line by line. The plugin must be
// loaded from here: InnoDB asks for keys before the server reads its table of
// plugins.
const encrypted = `innodb_encrypt_tables = FORCE
innodb_encrypt_log = ON
innodb_encrypt_temporary_tables = ON
innodb_encryption_threads = 4
innodb_encryption_rotate_key_age = 1
encrypt_tmp_disk_tables = ON
encrypt_tmp_files = ON
encrypt_binlog = ON
aria_encrypt_tables = ON
`

// pluginOptions are read by the server when it loads the plugin. loose_ keeps
// a server without the plugin able to start.
func pluginOptions(agentSocket, instance string) string {
	return "loose_keyward_socket = " + agentSocket + "\nloose_keyward_instance = " + instance + "\n"
}

// firstStage is the configuration while nothing is proved: the plugin's
// options and nothing that demands it.
func firstStage(agentSocket, instance string) []byte {
	return []byte(cnfHead + pluginOptions(agentSocket, instance))
}

// finalStage makes every later start depend on the plugin.
func finalStage(library, agentSocket, instance string) []byte {
	return []byte(cnfHead + "plugin_load_add = " + strings.TrimSuffix(library, ".so") + "\n" + pluginOptions(agentSocket, instance) + encrypted)
}

// checkCnfValue refuses what would break out of a line of the server's
// configuration.
func checkCnfValue(what, v string) error {
	if !filepath.IsAbs(v) || strings.ContainsAny(v, "\n\r#'\"\\ \t") {
		return fmt.Errorf("%w: %s %q: want an absolute path without blanks, quotes or '#'", dek.ErrInvalid, what, v)
	}
	return nil
}

// A Part is one part of the server's data and whether it is encrypted now.
type Part struct {
	Name string `json:"name"`
	Now  bool   `json:"now"`           // the running server encrypts what it writes there
	How  string `json:"how,omitempty"` // what is left to do, empty: nothing
}

// partVariables maps what can be encrypted to the variable that says so.
var partVariables = []struct{ name, variable, how string }{
	{"InnoDB tables", "innodb_encrypt_tables", "existing tables in the background: `keyward keyring status` shows how far"},
	{"Aria tables", "aria_encrypt_tables", "existing ones when they are next rebuilt (ALTER TABLE t FORCE)"},
	{"temporary tables on disk", "encrypt_tmp_disk_tables", ""},
	{"InnoDB temporary tablespace", "innodb_encrypt_temporary_tables", ""},
	{"temporary files", "encrypt_tmp_files", ""},
	{"redo log", "innodb_encrypt_log", ""},
	{"binary log", "encrypt_binlog", ""},
}

// Parts lists what the running server encrypts. What is off becomes encrypted
// at the next restart, when the server reads its configuration.
func (s *Server) Parts(ctx context.Context) ([]Part, error) {
	var parts []Part
	for _, v := range partVariables {
		val, known, err := s.Variable(ctx, v.variable)
		if err != nil {
			return nil, err
		}
		if !known {
			continue
		}
		p := Part{Name: v.name, Now: val == "ON" || val == "FORCE" || val == "1", How: v.how}
		if !p.Now {
			p.How = "encrypted at the server's next restart"
		}
		parts = append(parts, p)
	}
	return parts, nil
}

// EncryptNow switches on, in the running server, what can be switched on
// without a restart.
func (s *Server) EncryptNow(ctx context.Context) error {
	for _, q := range []string{
		"SET GLOBAL innodb_encryption_rotate_key_age = 1",
		"SET GLOBAL innodb_encryption_threads = 4",
		"SET GLOBAL innodb_encrypt_tables = 'FORCE'",
		"SET GLOBAL aria_encrypt_tables = ON",
		"SET GLOBAL encrypt_tmp_disk_tables = ON",
	} {
		if _, err := s.db.ExecContext(ctx, q); err != nil {
			return fmt.Errorf("%s: %w", q, classify(err))
		}
	}
	return nil
}
