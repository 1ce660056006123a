//! Users, groups and the roles that a tenant's members have.

use std::{collections::BTreeMap, fmt, str::FromStr};

use hypernetes_types::{TenantName, kinds::TENANT_GROUP_PREFIX};

/// Group of everybody who has shown who they are.
pub const ALL_AUTHENTICATED: &str = "system:authenticated";
/// Group of everybody who has not.
pub const ALL_UNAUTHENTICATED: &str = "system:unauthenticated";
/// Name of the user who has not shown who they are.
pub const ANONYMOUS: &str = "system:anonymous";
/// Group that may do everything, whatever roles exist.
pub const MASTERS: &str = "system:masters";

/// Group of the controllers that write what tenants have asked for. It may do everything that roles
/// can give, and the rules for tenants' objects hold for it.
pub const WORKLOAD_CONTROLLERS: &str = "system:hypernetes:workload-controllers";

/// Somebody who calls the API.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    /// Name, unique in the cluster.
    pub name: String,
    /// Unique id, if the source of the identity has one.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the source says.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// An authenticated user with these groups and `system:authenticated`.
    pub fn authenticated(
        name: impl Into<String>,
        groups: impl IntoIterator<Item = String>,
    ) -> Self {
        let mut user = Self {
            name: name.into(),
            groups: groups.into_iter().collect(),
            ..Self::default()
        };
        user.add_group(ALL_AUTHENTICATED);
        user
    }

    /// The user who has not shown who they are.
    pub fn anonymous() -> Self {
        Self {
            name: ANONYMOUS.into(),
            groups: vec![ALL_UNAUTHENTICATED.into()],
            ..Self::default()
        }
    }

    /// A part of the system itself, which may do everything.
    pub fn system(name: &str) -> Self {
        Self::authenticated(name, [MASTERS.to_owned()])
    }

    /// Whether the user is in the group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// Adds a group once.
    pub fn add_group(&mut self, group: &str) {
        if !self.is_in(group) {
            self.groups.push(group.to_owned());
        }
    }

    /// Namespace and name, if this is a ServiceAccount.
    pub fn service_account(&self) -> Option<(&str, &str)> {
        self.name
            .strip_prefix("system:serviceaccount:")?
            .split_once(':')
    }

    /// The tenants that the user is a member of, with the role in each.
    pub fn tenants(&self) -> impl Iterator<Item = (TenantName, TenantRole)> + '_ {
        self.groups
            .iter()
            .filter_map(|group| tenant_of_group(group))
    }
}

/// What a member of a tenant may do in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TenantRole {
    /// Read, but no secrets.
    View,
    /// Work with pods and what they need.
    Edit,
    /// Also hand roles to other members.
    Admin,
}

impl TenantRole {
    /// All roles, least first.
    pub const ALL: [Self; 3] = [Self::View, Self::Edit, Self::Admin];

    /// The role's name in groups and ClusterRoles.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Edit => "edit",
            Self::Admin => "admin",
        }
    }

    /// The ClusterRole that is bound in the tenant's namespaces.
    pub fn cluster_role(self) -> &'static str {
        match self {
            Self::View => "hypernetes-tenant-view",
            Self::Edit => "hypernetes-tenant-edit",
            Self::Admin => "hypernetes-tenant-admin",
        }
    }
}

impl fmt::Display for TenantRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no role: admin, edit or view")]
pub struct UnknownRole(String);

impl FromStr for TenantRole {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| UnknownRole(text.to_owned()))
    }
}

/// The group of a tenant's members with a role.
pub fn tenant_group(tenant: &TenantName, role: TenantRole) -> String {
    format!("{TENANT_GROUP_PREFIX}{tenant}:{role}")
}

/// Tenant and role of a group, if it is a tenant's.
pub fn tenant_of_group(group: &str) -> Option<(TenantName, TenantRole)> {
    let (tenant, role) = group.strip_prefix(TENANT_GROUP_PREFIX)?.rsplit_once(':')?;
    Some((tenant.parse().ok()?, role.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_groups_are_read_back() {
        let acme: TenantName = "acme".parse().unwrap();
        for role in TenantRole::ALL {
            assert_eq!(
                tenant_of_group(&tenant_group(&acme, role)),
                Some((acme.clone(), role))
            );
        }
        for bad in [
            "hypernetes:tenant:acme",
            "hypernetes:tenant:acme:root",
            "acme:admin",
            "hypernetes:tenant:a:b:admin",
        ] {
            assert_eq!(tenant_of_group(bad), None, "{bad}");
        }
    }

    #[test]
    fn everybody_is_in_one_of_the_two_groups() {
        assert!(User::authenticated("a", []).is_in(ALL_AUTHENTICATED));
        assert!(!User::anonymous().is_in(ALL_AUTHENTICATED));
        assert!(User::anonymous().is_in(ALL_UNAUTHENTICATED));
        assert!(User::system("x").is_in(MASTERS));
    }

    #[test]
    fn service_accounts_are_told_by_their_name() {
        let user = User::authenticated("system:serviceaccount:acme:default", []);
        assert_eq!(user.service_account(), Some(("acme", "default")));
        assert_eq!(User::system("x").service_account(), None);
    }
}
