package rpc

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/kmspb"
)

// A need says which identity a method asks for.
type need uint8

const (
	needNothing   need = iota + 1 // strangers may call
	needRenewable                 // a certificate, also one that ran out
	needIdentity                  // a certificate in force
)

// A laneName names a queue of calls that can't starve the others.
type laneName string

const (
	laneHealth laneName = "health"
	laneEnrol  laneName = "enrol"
	laneStart  laneName = "start" // database starts and renewals, before all refreshes
	laneUse    laneName = "use"
	laneOpen   laneName = "open" // streams that live long
	laneAdmin  laneName = "admin"
	laneBulk   laneName = "bulk"
)

// A method is one row of the table.
type method struct {
	name     string // full name, "/keyward.kms.v1.Admin/GetKey"
	op       kms.Operation
	need     need
	deadline time.Duration // the longest it may take
	endless  bool          // a stream without a deadline
	maxBytes int           // of one request message
	lane     laneName
}

const (
	kib = 1 << 10
	// maxBatch bounds the items of UnwrapBatch.
	maxBatch = 1000
	// maxBatchBytes leaves room for tags and lengths.
	maxBatchBytes = maxBatch * (dek.MaxWrapped + 32)
)

// methods is the table. There is no other way into the service.
func methods() []method {
	return slices.Concat(instanceMethods(), adminMethods(), healthMethods())
}

func instanceMethods() []method {
	return []method{
		{kmspb.Enrolment_Enroll_FullMethodName, kms.OpEnroll, needNothing, 20 * time.Second, false, 16 * kib, laneEnrol},
		{kmspb.Instances_Renew_FullMethodName, kms.OpRenew, needRenewable, 20 * time.Second, false, 16 * kib, laneStart},
		{kmspb.Instances_Open_FullMethodName, kms.OpInstanceOpen, needIdentity, 20 * time.Second, false, 16 * kib, laneStart},
		{kmspb.Instances_Unwrap_FullMethodName, kms.OpKeyringUnwrap, needIdentity, 20 * time.Second, false, 5 * kib, laneUse},
		{kmspb.Instances_UnwrapBatch_FullMethodName, kms.OpKeyringUnwrap, needIdentity, 60 * time.Second, false, maxBatchBytes, laneUse},
		{kmspb.Instances_UnwrapStream_FullMethodName, kms.OpKeyringUnwrap, needIdentity, 0, true, 5 * kib, laneOpen},
		{kmspb.Instances_Watch_FullMethodName, kms.OpKeyringWatch, needIdentity, 0, true, kib, laneOpen},
		{kmspb.Instances_Report_FullMethodName, kms.OpInstanceReport, needIdentity, 20 * time.Second, false, 1024 * kib, laneAdmin},
	}
}

// adminMethods have rows of one shape: a minute, a small request.
func adminMethods() []method {
	row := func(name string, op kms.Operation) method {
		return method{name, op, needIdentity, time.Minute, false, 16 * kib, laneAdmin}
	}
	stream := func(name string, op kms.Operation) method {
		return method{name, op, needIdentity, 0, true, 16 * kib, laneBulk}
	}
	return []method{
		row(kmspb.Admin_CreateVault_FullMethodName, kms.OpVaultCreate),
		row(kmspb.Admin_ListVaults_FullMethodName, kms.OpVaultRead),
		row(kmspb.Admin_CreateKey_FullMethodName, kms.OpKeyCreate),
		row(kmspb.Admin_RollKey_FullMethodName, kms.OpKeyRoll),
		row(kmspb.Admin_GetKey_FullMethodName, kms.OpKeyRead),
		row(kmspb.Admin_ListKeys_FullMethodName, kms.OpKeyRead),
		row(kmspb.Admin_SetKeyEnabled_FullMethodName, kms.OpKeySetEnabled),
		stream(kmspb.Admin_RewrapKey_FullMethodName, kms.OpKeyRewrap),
		row(kmspb.Admin_CreateKeyring_FullMethodName, kms.OpKeyringCreate),
		row(kmspb.Admin_RollKeyring_FullMethodName, kms.OpKeyringRoll),
		row(kmspb.Admin_GetKeyring_FullMethodName, kms.OpKeyringRead),
		row(kmspb.Admin_ListKeyrings_FullMethodName, kms.OpKeyringRead),
		row(kmspb.Admin_SetKeyringEnabled_FullMethodName, kms.OpKeyringSetState),
		row(kmspb.Admin_PrepareInstance_FullMethodName, kms.OpInstancePrepare),
		row(kmspb.Admin_ListInstances_FullMethodName, kms.OpInstanceRead),
		row(kmspb.Admin_RevokeInstance_FullMethodName, kms.OpInstanceRevoke),
		row(kmspb.Admin_AddGrant_FullMethodName, kms.OpGrantAdd),
		row(kmspb.Admin_RemoveGrant_FullMethodName, kms.OpGrantRemove),
		row(kmspb.Admin_ListGrants_FullMethodName, kms.OpGrantRead),
		row(kmspb.Admin_CreateToken_FullMethodName, kms.OpTokenCreate),
		row(kmspb.Admin_RevokeIdentity_FullMethodName, kms.OpIdentityRevoke),
		row(kmspb.Admin_GetStatus_FullMethodName, kms.OpStatus),
		stream(kmspb.Admin_Backup_FullMethodName, kms.OpBackup),
		stream(kmspb.Admin_ReadAudit_FullMethodName, kms.OpAuditRead),
		stream(kmspb.Admin_ExportAudit_FullMethodName, kms.OpAuditRead),
	}
}

// healthMethods say whether the service serves, and nothing else, to anyone.
func healthMethods() []method {
	return []method{
		{healthpb.Health_Check_FullMethodName, kms.OpStatus, needNothing, 5 * time.Second, false, kib, laneHealth},
		{healthpb.Health_List_FullMethodName, kms.OpStatus, needNothing, 5 * time.Second, false, kib, laneHealth},
		{healthpb.Health_Watch_FullMethodName, kms.OpStatus, needNothing, time.Hour, false, kib, laneHealth},
	}
}

// descriptions are the services that the door serves.
func descriptions() []*grpc.ServiceDesc {
	return []*grpc.ServiceDesc{
		&kmspb.Enrolment_ServiceDesc, &kmspb.Instances_ServiceDesc, &kmspb.Admin_ServiceDesc, &healthpb.Health_ServiceDesc,
	}
}

// compileMethods checks the table against what is registered: each method has
// exactly one row, each row one method, an operation with a rule, bounds and a
// lane. It wraps dek.ErrInvalid and names the first row that is wrong.
func compileMethods(table []method, descs []*grpc.ServiceDesc, rules Rules) (map[string]*method, error) {
	rows := make(map[string]*method, len(table))
	for i := range table {
		m := &table[i]
		switch {
		case rows[m.name] != nil:
			return nil, fmt.Errorf("%w: rpc: method %s has two rows", dek.ErrInvalid, m.name)
		case !rules.Known(m.op):
			return nil, fmt.Errorf("%w: rpc: method %s: operation %q has no rule", dek.ErrInvalid, m.name, m.op)
		case m.need == 0 || m.maxBytes <= 0 || m.deadline < 0 || (m.deadline == 0) != m.endless || laneSizes()[m.lane] == 0:
			return nil, fmt.Errorf("%w: rpc: method %s: identity, deadline, size and lane are required", dek.ErrInvalid, m.name)
		}
		rows[m.name] = m
	}
	served := 0
	for _, name := range methodNames(descs) {
		if rows[name] == nil {
			return nil, fmt.Errorf("%w: rpc: method %s has no row", dek.ErrInvalid, name)
		}
		served++
	}
	if served != len(rows) {
		return nil, fmt.Errorf("%w: rpc: %d rows for %d methods", dek.ErrInvalid, len(rows), served)
	}
	return rows, nil
}

func methodNames(descs []*grpc.ServiceDesc) []string {
	var names []string
	for _, d := range descs {
		for _, m := range d.Methods {
			names = append(names, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, m := range d.Streams {
			names = append(names, "/"+d.ServiceName+"/"+m.StreamName)
		}
	}
	return names
}
